# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Scores of a generated set as the literature reports them, and a table of any of them by name."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_features
from .frechet import RealRoot, frechet_distance
from .kernel import KernelDistance
from .prdc import precision_recall_density_coverage
from .statistics import FeatureStatistics

# The others need features of real images
OF_STATISTICS = ("frechet", "frechet_ratio", "frechet_infinity", "inception_score")
METRICS = (*OF_STATISTICS, "kid", "kernel", "mmd", "cmmd", "precision", "recall", "density", "coverage")


def kernel_inception_distance(
    real: Tensor, generated: Tensor, num_subsets: int = 100, subset_size: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): mean and std of the unbiased MMD² over random subsets, drawn as by torch-fidelity."""
    if min(len(real), len(generated)) < subset_size:
        counts = f"{len(real)} real or {len(generated)} generated images"
        raise ValueError(f"subset_size={subset_size} is more than the {counts}: give more, or report a smaller size.")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        rows, real_rows = (random.choice(len(f), subset_size, replace=False) for f in (generated, real))
        values.append(KernelDistance(real[torch.from_numpy(real_rows)]).fit(generated[torch.from_numpy(rows)]).value)
    return float(np.mean(values)), float(np.std(values))


def cmmd(real: Tensor, generated: Tensor) -> float:
    """CMMD (arXiv 2401.09603): 1000 times the biased MMD² of CLIP's embeddings, by a Gaussian kernel of σ = 10."""
    real, generated = (F.normalize(features.double(), dim=1) for features in (real, generated))
    distance = KernelDistance(real, kernel="gaussian", unbiased=False, bandwidths=(10.0,))
    return 1_000 * distance.fit(generated).value


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = None) -> tuple[float, float]:
    """Inception Score (arXiv 1606.03498): mean and std over splits. Without a `seed`, sorted images score too low."""
    check_features(logits, "logits")
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"splits={splits} must lie between 1 and the number of images, {count}.")
    order = torch.arange(count) if seed is None else torch.from_numpy(np.random.RandomState(seed).permutation(count))
    scores = []
    for split in range(splits):
        rows = order[split * count // splits : (split + 1) * count // splits]
        log_p = logits[rows].double().log_softmax(dim=1)
        log_q = log_p.logsumexp(dim=0) - math.log(len(rows))
        scores.append((log_p.exp() * (log_p - log_q)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def frechet_infinity(real: Tensor | FeatureStatistics, generated: Tensor, *, seed: int = 0) -> float:
    """FID∞ (arXiv 1911.07023): a line in 1/n through distances of random subsets, read off at 0. N is at least 4 d."""
    real, count = _statistics(real), len(generated)
    least = max(count // 10, 2 * real.dimension)
    if count < 2 * least:
        raise ValueError(f"there are {count} generated images: an extrapolation needs 4 d = {2 * least} of them.")
    root = RealRoot.of(real)
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(least, count, 15).round().astype(int)
    subsets = (generated[torch.randperm(count, generator=generator)[:size]] for size in sizes)
    distances = [frechet_distance(_statistics(subset), real, root) for subset in subsets]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


@torch.no_grad()
def feature_metrics(
    real: Tensor | FeatureStatistics,
    generated: Tensor,
    metrics: Sequence[str] = ("frechet",),
    *,
    logits: Tensor | None = None,
    other_real: FeatureStatistics | None = None,
    seed: int = 0,
    spread: int = 0,
) -> dict[str, float]:
    """
    Metrics of a generated set by name, as the literature reports them.

    `spread` estimates standard deviations between evaluations with other seeds from as many random halves of the set,
    where a metric has none of its own: the variance between halves is that between independent sets of the whole size,
    to first order (the delete-d jackknife of Shao and Wu, Annals of Statistics 17, 1989). FID∞ gets none.

    Args:
        real ([`FeatureStatistics`] or `torch.Tensor` of shape `(M, d)`): the real set. Statistics suffice for the
            Fréchet distances and the Inception Score.
        generated (`torch.Tensor` of shape `(N, d)`): any float dtype.
        metrics (`Sequence[str]`, *optional*, defaults to `("frechet",)`): `"frechet"`; `"frechet_ratio"`, divided by
            that of other real images (FDr, arXiv 2604.28190); `"frechet_infinity"`; `"kid"`; `"kernel"` and `"mmd"`,
            the unbiased polynomial and Gaussian [`KernelDistance`]; `"cmmd"`, for CLIP embeddings; `"precision"` and
            `"recall"` with k = 3; `"density"` and `"coverage"` with k = 5; `"inception_score"`. Each may come with a
            `"<name>_std"`.
        logits (`torch.Tensor` of shape `(N, C)`, *optional*): class logits of the generated images.
        other_real ([`FeatureStatistics`], *optional*): N other real images, for `"frechet_ratio"`.
        seed (`int`, *optional*, defaults to 0): seed of random subsets and of the Inception Score's order.
    """
    if not metrics or not {*metrics} <= {*METRICS}:
        raise ValueError(f"metrics={metrics} are unknown or none: choose from {', '.join(METRICS)}.")
    if isinstance(real, FeatureStatistics):
        if not {*metrics} <= {*OF_STATISTICS}:
            raise ValueError(f"{', '.join(metrics)} need real features (M, {real.dimension}), not statistics alone.")
        dimension = real.dimension
    else:
        dimension = check_features(real, "real features").shape[1]
    check_features(generated, "generated features", dimension)
    if "inception_score" in metrics and (logits is None or len(logits) != len(generated)):
        raise ValueError(f"inception_score needs logits of the {len(generated)} generated images: pass logits (N, C).")
    if "frechet_ratio" in metrics and (other_real is None or other_real.count not in (0, None, len(generated))):
        found = "none" if other_real is None else str(other_real.count)
        raise ValueError(f"frechet_ratio compares {len(generated)} images with as many other real ones: got {found}.")
    generator, size = torch.Generator().manual_seed(seed), round(len(generated) / 2)
    halves = [torch.randperm(len(generated), generator=generator)[:size] for _ in range(spread)]
    values: dict[str, float] = {}
    for name in dict.fromkeys(metrics):
        if name == "inception_score" and logits is not None:
            values[name], values["inception_score_std"] = inception_score(logits, seed=seed)
        elif name == "kid" and isinstance(real, Tensor):
            values[name], values["kid_std"] = kernel_inception_distance(real, generated, seed=seed)
        elif name == "frechet_infinity":
            values[name] = frechet_infinity(real, generated, seed=seed)
        elif name not in values:
            metric = _metric(name, real, other_real)
            values |= metric(generated)
            repeated = [metric(generated[rows]) for rows in halves]
            for key in repeated[0] if halves else ():
                values[f"{key}_std"] = float(np.std([each[key] for each in repeated], ddof=1))
    return {key: values[key] for name in dict.fromkeys(metrics) for key in (name, f"{name}_std") if key in values}


def _metric(
    name: str, real: Tensor | FeatureStatistics, other_real: FeatureStatistics | None
) -> Callable[[Tensor], dict[str, float]]:
    """A metric as a function of the generated features; work on the real side is done here, once."""
    if name in ("frechet", "frechet_ratio"):
        statistics = _statistics(real)
        root = RealRoot.of(statistics)
        unit = 1.0 if name == "frechet" or other_real is None else frechet_distance(other_real, statistics, root)
        return lambda generated: {name: frechet_distance(_statistics(generated), statistics, root) / unit}
    assert isinstance(real, Tensor)
    if name in ("kernel", "mmd"):
        distance = KernelDistance(real, kernel="polynomial" if name == "kernel" else "gaussian")
        return lambda generated: {name: distance.fit(generated).value}
    if name == "cmmd":
        return lambda generated: {name: cmmd(real, generated)}
    return partial(precision_recall_density_coverage, real, precision_recall_k=3)


def _statistics(features: Tensor | FeatureStatistics) -> FeatureStatistics:
    """Statistics of features, in blocks: their float64 copy may not fit."""
    if isinstance(features, FeatureStatistics):
        return features
    statistics = FeatureStatistics(features.shape[1]).to(features.device)
    for part in features.split(4096):
        statistics.update(part)
    return statistics
