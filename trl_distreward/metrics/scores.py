# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Scores of a generated set as the literature reports them, and a table of any of them from two sets of features."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_shape_and_values
from .frechet import frechet_distance, symmetric_sqrt
from .kernel import KernelDistance
from .prdc import precision_recall_density_coverage
from .spread import half_sample_spread
from .statistics import FeatureStatistics

STREAMED_ROWS = 4_096  # rows whose float64 copy exists at a time


class Score(NamedTuple):
    """A mean and the standard deviation (divided by the number) of what it is the mean of."""

    mean: float
    std: float


def kernel_inception_distance(
    real: Tensor,
    generated: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1_000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """
    Kernel inception distance as it is reported: mean and standard deviation of the unbiased MMD² over pairs of random
    subsets (Bińkowski et al., arXiv 1801.01401, Sec. 4). The distance of the whole sets is [`KernelDistance`]'s.

    Subsets are drawn as torch-fidelity draws them, generated before real by one `numpy.random.RandomState(seed)`, so
    that its `rng_seed` gives the same ones.

    Args:
        real (`torch.Tensor` of shape `(M, d)`), generated (`torch.Tensor` of shape `(N, d)`): any float dtype.
        num_subsets (`int`, *optional*, defaults to 100): number of pairs of subsets.
        subset_size (`int`, *optional*, defaults to 1000): rows of a subset, drawn without replacement.
        degree (`int`, *optional*, defaults to 3), gamma (`float`, *optional*, defaults to 1/d), coef (`float`,
            *optional*, defaults to 1.0): of the polynomial kernel `(gamma x·y + coef)^degree`.
        seed (`int`, *optional*, defaults to 0): of the subsets.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        `Score`: `mean` and `std`, in the kernel's own units.

    Raises:
        ValueError: a set has fewer rows than a subset, wrong shapes or dimensions, NaN or infinite values.
    """
    _check_pair(real, generated)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"num_subsets={num_subsets} must be at least 1 and subset_size={subset_size} at least 2.")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < subset_size:
            raise ValueError(
                f"subset_size={subset_size} is more than the {len(features)} {name} images: give more images or "
                "smaller subsets, and say so beside the number."
            )
    random = np.random.RandomState(seed)
    values = []
    for _ in tqdm(range(num_subsets), disable=not progress, unit="subset", desc="kernel distance"):
        subsets = []
        for features in (generated, real):
            rows = random.choice(len(features), subset_size, replace=False)
            subsets.append(features[torch.from_numpy(rows).to(features.device)])
        distance = KernelDistance(subsets[1], degree=degree, gamma=gamma, coef=coef)
        values.append(distance.fit(subsets[0]).value)
    return Score(float(np.mean(values)), float(np.std(values)))


def cmmd(real: Tensor, generated: Tensor) -> float:
    """
    CMMD: 1000 times the biased MMD² under a Gaussian kernel of σ = 10 (Jayasumana et al., arXiv 2401.09603, Sec. 4 and
    their code), of CLIP image embeddings, which are normalised here.

    Args:
        real (`torch.Tensor` of shape `(M, d)`), generated (`torch.Tensor` of shape `(N, d)`): any float dtype.

    Raises:
        ValueError: fewer than 2 rows, wrong shapes or dimensions, NaN or infinite values.
    """
    _check_pair(real, generated)
    real, generated = (F.normalize(features.double(), dim=1) for features in (real, generated))
    distance = KernelDistance(real, kernel="gaussian", unbiased=False, bandwidths=(10.0,))
    return 1_000 * distance.fit(generated).value


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = None) -> Score:
    """
    Inception Score: mean and standard deviation over splits of `exp(mean_x KL(p(y|x) ‖ p(y)))`, with p(y) the mean of
    p(y|x) over the split (Salimans et al., arXiv 1606.03498, Sec. 4).

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): of the classes, without bias where torch-fidelity is to be matched.
        splits (`int`, *optional*, defaults to 10): parts of equal length, up to one row.
        seed (`int`, *optional*):
            shuffles the rows first, as torch-fidelity does with its `rng_seed`. By default they keep their order:
            images that are sorted by class then score far too low.

    Returns:
        `Score`: `mean` and `std`.

    Raises:
        ValueError: fewer rows than splits, a wrong shape, NaN or infinite values.
    """
    check_shape_and_values(logits, "logits")
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"splits={splits} must lie between 1 and the number of images, {count}.")
    order = torch.arange(count) if seed is None else torch.from_numpy(np.random.RandomState(seed).permutation(count))
    scores = []
    for split in range(splits):
        rows = order[split * count // splits : (split + 1) * count // splits].to(logits.device)
        log_p = logits[rows].double().log_softmax(dim=1)
        log_q = log_p.logsumexp(dim=0) - math.log(len(rows))
        scores.append((log_p.exp() * (log_p - log_q)).sum(dim=1).mean().exp().item())
    return Score(float(np.mean(scores)), float(np.std(scores)))


def frechet_infinity(
    real: Tensor | FeatureStatistics,
    generated: Tensor,
    *,
    num_sizes: int = 15,
    smallest: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """
    Fréchet distance extrapolated to infinitely many generated images, FID∞ with Inception features (Chong and Forsyth,
    arXiv 1911.07023, Sec. 4): its bias is linear in 1/N to first order, so a line is fitted through distances of
    random subsets of several sizes, and read off at 0. The real set keeps its size.

    Args:
        real ([`FeatureStatistics`] or `torch.Tensor` of shape `(M, d)`): the real set.
        generated (`torch.Tensor` of shape `(N, d)`): any float dtype.
        num_sizes (`int`, *optional*, defaults to 15): sizes, evenly spaced from `smallest` to N.
        smallest (`int`, *optional*):
            the smallest size; by default N / 10, which is the paper's 5,000 of 50,000, or 2 d if that is more: near d
            and below the distance is not linear in 1/N.
        seed (`int`, *optional*, defaults to 0): of the subsets.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Raises:
        ValueError: fewer than twice `smallest` rows, wrong shapes or dimensions, NaN or infinite values.
    """
    real = _streamed(real)
    check_shape_and_values(generated, "generated features", real.dimension)
    count = len(generated)
    least = max(count // 10, 2 * real.dimension) if smallest is None else smallest
    if num_sizes < 2 or least < 2 or count < 2 * least:
        raise ValueError(
            f"{count} generated images, num_sizes={num_sizes}, smallest={least}: a line needs at least 2 sizes, and "
            "from the smallest, which is at least 2, to twice of it. Give more images; smallest=… trusts smaller sets."
        )
    root = symmetric_sqrt(real.covariance, real.rank_bound)
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(least, count, num_sizes).round().astype(int)
    distances = []
    for size in tqdm(sizes, disable=not progress, unit="size", desc="Fréchet distance"):
        rows = torch.randperm(count, generator=generator)[:size].to(generated.device)
        distances.append(frechet_distance(_streamed(generated, rows), real, root))
    return float(np.polyfit(1 / sizes, distances, 1)[1])


# ---- the table ----

MANIFOLD = ("precision", "recall", "density", "coverage")  # all from one pass over the distances
FRECHET = ("frechet", "fid", "frechet_infinity", "fid_infinity")
METRICS = (*FRECHET, "kid", "kernel", "mmd", "cmmd", *MANIFOLD, "inception_score")
_OWN_STD = ("kid", "inception_score", "frechet_infinity", "fid_infinity")  # reported with another one, or with none


@torch.no_grad()
def feature_metrics(
    real: Tensor | FeatureStatistics,
    generated: Tensor,
    metrics: Sequence[str] = ("frechet",),
    *,
    logits: Tensor | None = None,
    seed: int = 0,
    spread: int = 0,
    progress: bool = False,
    kid_subsets: int = 100,
    kid_subset_size: int = 1_000,
    nearest_k: int = 5,
    precision_recall_k: int = 3,
    splits: int = 10,
) -> dict[str, float]:
    """
    Metrics of a generated set by name, as the literature reports them.

    | name | what it is |
    |---|---|
    | `"frechet"`, `"fid"` | [`frechet_distance`], of whatever the features are |
    | `"frechet_infinity"`, `"fid_infinity"` | [`metrics.frechet_infinity`] |
    | `"kid"` | [`metrics.kernel_inception_distance`], with `"kid_std"` over the subsets |
    | `"kernel"` | the same kernel's unbiased MMD² of the whole sets |
    | `"mmd"` | [`KernelDistance`]`(kernel="gaussian")`, unbiased, its bandwidths from the real rows |
    | `"cmmd"` | [`metrics.cmmd`], to be used with CLIP embeddings |
    | `"precision"`, `"recall"`, `"density"`, `"coverage"` | [`metrics.precision_recall_density_coverage`] |
    | `"inception_score"` | [`metrics.inception_score`], with `"inception_score_std"` over the splits |

    Args:
        real ([`FeatureStatistics`] or `torch.Tensor` of shape `(M, d)`):
            the real set. Statistics suffice for the Fréchet distances and the Inception Score.
        generated (`torch.Tensor` of shape `(N, d)`): any float dtype.
        metrics (`Sequence[str]`, *optional*, defaults to `("frechet",)`): names.
        logits (`torch.Tensor` of shape `(N, C)`, *optional*): class logits of the generated images.
        seed (`int`, *optional*, defaults to 0): of every random subset and of the Inception Score's order.
        spread (`int`, *optional*, defaults to 0):
            number of random halves of the generated set to estimate standard deviations from, under the metric's name
            and `"_std"`, with [`metrics.half_sample_spread`]; 0 for none. `"kid_std"` and
            `"inception_score_std"` stay what the literature means by them; an extrapolation has none.
        progress (`bool`, *optional*, defaults to `False`): whether to show progress bars.
        kid_subsets (`int`, *optional*, defaults to 100), kid_subset_size (`int`, *optional*, defaults to 1000):
            as in [`metrics.kernel_inception_distance`].
        nearest_k (`int`, *optional*, defaults to 5), precision_recall_k (`int`, *optional*, defaults to 3):
            k of density and coverage, and of precision and recall.
        splits (`int`, *optional*, defaults to 10): of the Inception Score.

    Returns:
        `dict[str, float]`: in the order of `metrics`.

    Raises:
        ValueError: an unknown metric, one that needs real features or logits that are not given, a set with fewer
            images than a metric needs, dimensions that differ, NaN or infinite values.

    Example:

    ```python
    >>> feature_metrics(real, generated, ["frechet", "precision"], spread=10)  # (M, d), (N, d)
    {'frechet': 1.93, 'frechet_std': 0.04, 'precision': 0.71, 'precision_std': 0.01}
    ```
    """
    names = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    _check_names(names, real, logits)
    _check_pair(real, generated)
    if logits is not None and len(logits) != len(generated):
        raise ValueError(f"there are {len(logits)} logits but {len(generated)} generated images: give one row each.")
    shown = progress and not spread
    settings: dict[str, dict[str, Any]] = {
        "infinity": {"seed": seed, "progress": shown},
        "kid": {"num_subsets": kid_subsets, "subset_size": kid_subset_size, "seed": seed, "progress": shown},
        "manifold": {"nearest_k": nearest_k, "precision_recall_k": precision_recall_k, "progress": shown},
        "inception_score": {"splits": splits, "seed": seed},
    }
    values: dict[str, float] = {}
    for name in names:
        if name in values:
            continue
        metric = _metric(name, real, logits, settings)
        values |= metric(generated)
        if spread and name not in _OWN_STD:
            halves = partial(_of_rows, metric, generated)
            stds = half_sample_spread(halves, len(generated), spread, seed=seed, progress=progress)
            values |= {f"{key}_std": std for key, std in stds.items()}
    return {key: values[key] for name in names for key in (name, f"{name}_std") if key in values}


def _metric(
    name: str, real: Any, logits: Tensor | None, settings: dict[str, dict[str, Any]]
) -> Callable[[Tensor], dict[str, float]]:
    """A metric as a function of the generated features; what it needs of the real side is computed here, once."""
    if name in ("frechet", "fid"):
        statistics = _streamed(real)
        root = symmetric_sqrt(statistics.covariance, statistics.rank_bound)
        return lambda generated: {name: frechet_distance(_streamed(generated), statistics, root)}
    if name in FRECHET:
        return lambda generated: {name: frechet_infinity(real, generated, **settings["infinity"])}
    if name in ("kernel", "mmd"):
        distance = KernelDistance(real, kernel="polynomial" if name == "kernel" else "gaussian")
        return lambda generated: {name: distance.fit(generated).value}
    if name == "cmmd":
        return lambda generated: {name: cmmd(real, generated)}
    if name == "kid":
        return lambda generated: _with_std(name, kernel_inception_distance(real, generated, **settings["kid"]))
    if name == "inception_score":
        return lambda _: _with_std(name, inception_score(logits, **settings["inception_score"]))  # type: ignore[arg-type]
    return lambda generated: precision_recall_density_coverage(real, generated, **settings["manifold"])


def _with_std(name: str, score: Score) -> dict[str, float]:
    return {name: score.mean, f"{name}_std": score.std}


def _of_rows(metric: Callable[[Tensor], dict[str, float]], features: Tensor, rows: Tensor) -> dict[str, float]:
    return metric(features[rows.to(features.device)])


def _streamed(features: Tensor | FeatureStatistics, rows: Tensor | None = None) -> FeatureStatistics:
    """Statistics of (some rows of) features; blocked, as their float64 copy may not fit."""
    if isinstance(features, FeatureStatistics):
        return features
    statistics = FeatureStatistics(features.shape[1])
    statistics.mean, statistics._scatter = statistics.mean.to(features.device), statistics._scatter.to(features.device)
    count = len(features) if rows is None else len(rows)
    for start in range(0, count, STREAMED_ROWS):
        part = slice(start, start + STREAMED_ROWS)
        statistics.update(features[part] if rows is None else features[rows[part]])
    return statistics


def _check_names(names: Sequence[str], real: Tensor | FeatureStatistics, logits: Tensor | None) -> None:
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"metrics={unknown or names} are unknown or none: choose from {', '.join(METRICS)}.")
    beyond = [name for name in names if name not in (*FRECHET, "inception_score")]
    if isinstance(real, FeatureStatistics) and beyond:
        raise ValueError(
            f"{', '.join(beyond)} compare images with images, but the real set is given as mean and covariance only: "
            f"give its features (M, {real.dimension}), or ask for frechet alone."
        )
    if "inception_score" in names and logits is None:
        raise ValueError(
            "inception_score needs the class logits of the generated images: pass logits of shape (N, C)."
        )


def _check_pair(real: Tensor | FeatureStatistics, generated: Tensor) -> None:
    if isinstance(real, Tensor):
        check_shape_and_values(real, "real features")
        dimension = real.shape[1]
    else:
        dimension = real.dimension
    check_shape_and_values(generated, "generated features", dimension)
    for name, count in (
        ("real", len(real) if isinstance(real, Tensor) else real.count),
        ("generated", len(generated)),
    ):
        if count is not None and count < 2:
            raise ValueError(f"there are {count} {name} images: a distance between sets needs at least 2 of each.")
