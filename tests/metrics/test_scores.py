# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from functools import partial

import numpy as np
import pytest
import torch

from trl_distreward import (
    FeatureStatistics,
    KernelDistance,
    feature_metrics,
    frechet_distance,
    precision_recall_density_coverage,
)
from trl_distreward.metrics import cmmd, frechet_infinity, inception_score, kernel_inception_distance, scores
from trl_distreward.metrics.scores import METRICS


def normal(count, dimension, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64).float() + shift


def unbiased_mmd(x, y):
    """The definition with the cubic kernel, in float64."""
    x, y = x.double().numpy(), y.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    own = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return sum(own) - 2 * kernel(x, y).mean()


REAL, GENERATED = normal(300, 8, 1), normal(260, 8, 2, shift=0.2)
LOGITS = 3 * normal(260, 10, 4)


def test_kid_is_the_mean_over_the_subsets_torch_fidelity_draws():
    random, values = np.random.RandomState(7), []
    for _ in range(5):
        generated = GENERATED[random.choice(260, 50, replace=False)]
        values.append(unbiased_mmd(generated, REAL[random.choice(300, 50, replace=False)]))
    score = kernel_inception_distance(REAL, GENERATED, num_subsets=5, subset_size=50, seed=7)
    assert score == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)


def test_cmmd_is_the_biased_gaussian_mmd_of_normalised_rows():
    x, y = (rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (REAL, GENERATED))
    kernel = lambda a, b: (-torch.cdist(a, b).square() / 200).exp().mean()  # noqa: E731
    expected = 1_000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).item()
    assert cmmd(REAL, GENERATED) == pytest.approx(expected, rel=1e-10)
    assert cmmd(8 * REAL, GENERATED / 8) == pytest.approx(expected, rel=1e-10)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-12)


def test_inception_score_is_its_formula():
    rows = LOGITS.double()[np.random.RandomState(3).permutation(260)]
    expected = []
    for split in range(7):
        p = rows[split * 260 // 7 : (split + 1) * 260 // 7].softmax(dim=1)
        expected.append((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp().item())
    assert inception_score(LOGITS, 7, seed=3) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-12)


def test_extrapolated_distance_has_less_bias():
    """All sets come from one distribution, so that the distance of infinitely many images is 0."""
    real = FeatureStatistics.from_moments(torch.zeros(16).double(), torch.eye(16).double())
    sets = [normal(1_000, 16, seed) for seed in range(20)]
    biased = np.mean([frechet_distance(FeatureStatistics.from_features(rows), real) for rows in sets])
    assert abs(np.mean([frechet_infinity(real, rows) for rows in sets])) < 0.15 * biased
    assert frechet_infinity(real, sets[0]) == frechet_infinity(real, sets[0])


@pytest.fixture
def small_kid(monkeypatch):
    """KID over subsets that the sets here are large enough for."""
    small = partial(kernel_inception_distance, num_subsets=4, subset_size=40)
    monkeypatch.setattr(scores, "kernel_inception_distance", small)
    return small


def test_table_equals_each_metric_alone(small_kid):
    other = FeatureStatistics.from_features(normal(260, 8, 3))
    table = feature_metrics(REAL, GENERATED, METRICS, logits=LOGITS, other_real=other, seed=5)
    kid, score = small_kid(REAL, GENERATED, seed=5), inception_score(LOGITS, seed=5)
    expected = {
        "frechet": frechet_distance(*map(FeatureStatistics.from_features, (GENERATED, REAL))),
        "frechet_ratio": frechet_distance(*map(FeatureStatistics.from_features, (GENERATED, REAL)))
        / frechet_distance(other, FeatureStatistics.from_features(REAL)),
        "frechet_infinity": frechet_infinity(REAL, GENERATED, seed=5),
        "inception_score": score[0],
        "inception_score_std": score[1],
        "kid": kid[0],
        "kid_std": kid[1],
        "kernel": KernelDistance(REAL).fit(GENERATED).value,
        "mmd": KernelDistance(REAL, kernel="gaussian").fit(GENERATED).value,
        "cmmd": cmmd(REAL, GENERATED),
        **precision_recall_density_coverage(REAL, GENERATED, 5, precision_recall_k=3),
    }
    assert table == pytest.approx(expected, rel=1e-9) and list(table) == list(expected)


def test_statistics_suffice_for_frechet_distances_only():
    statistics = FeatureStatistics.from_features(REAL)
    names = ["frechet", "frechet_ratio", "frechet_infinity", "inception_score"]
    options = {"logits": LOGITS, "other_real": FeatureStatistics.from_features(normal(260, 8, 3))}
    table = feature_metrics(statistics, GENERATED, names, **options)
    assert table == pytest.approx(feature_metrics(REAL, GENERATED, names, **options), rel=1e-9)
    for name in set(METRICS) - set(names):
        with pytest.raises(ValueError, match=f"^frechet, {name} need real features"):
            feature_metrics(statistics, GENERATED, ["frechet", name])


def test_spread_is_added_and_leaves_the_values_unchanged(small_kid):
    names = ["recall", "frechet", "kid"]
    plain = feature_metrics(REAL, GENERATED, names)
    table = feature_metrics(REAL, GENERATED, names, spread=5)
    assert list(table) == ["recall", "recall_std", "frechet", "frechet_std", "kid", "kid_std"]
    assert {name: table[name] for name in plain} == plain
    assert 0 < table["recall_std"] < 0.1 and 0 < table["frechet_std"] < 0.5 * table["frechet"]


def test_spread_predicts_the_spread_between_sets():
    real = FeatureStatistics.from_features(normal(4_000, 4))
    sets = [normal(400, 4, seed, shift=0.3) for seed in range(10, 50)]
    between = np.std([feature_metrics(real, rows)["frechet"] for rows in sets], ddof=1)
    assert feature_metrics(real, sets[0], spread=60)["frechet_std"] == pytest.approx(between, rel=0.4)


def test_float16_features_give_the_values_of_float64_ones():
    real, generated = REAL.half(), GENERATED.half()
    names = ["frechet", "mmd", "recall"]
    assert feature_metrics(real, generated, names) == pytest.approx(
        feature_metrics(real.double(), generated.double(), names), rel=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["kid", "IS"]}, r"\['kid', 'IS'\] are unknown or none: choose from frechet, "),
        ({"metrics": []}, r"\[\] are unknown or none"),
        ({"metrics": ["frechet_ratio"]}, "compares 260 images with as many other real ones: got none"),
        ({"metrics": ["frechet_ratio"], "other_real": FeatureStatistics.from_features(REAL)}, "ones: got 300"),
        ({"metrics": ["inception_score"]}, "inception_score needs logits of the 260"),
        ({"logits": LOGITS[:7], "metrics": ["inception_score"]}, "needs logits of the 260"),
        ({"generated": GENERATED[:4], "logits": LOGITS[:4], "metrics": ["inception_score"]}, "splits=10"),
        ({"metrics": ["kid"]}, "subset_size=1000 is more than the 300 real or 260"),
        ({"generated": GENERATED[:20], "metrics": ["frechet_infinity"]}, "20 generated images: .* 4 d = 32"),
        ({"generated": GENERATED[:1]}, "count=1"),
        ({"generated": GENERATED[:3], "metrics": ["recall"]}, "must lie in 1 to 2, below"),
        ({"generated": GENERATED[:, :5]}, "dimension 5.* have 8"),
        ({"generated": GENERATED * torch.tensor([1.0] * 7 + [torch.nan])}, "generated features have NaN or infinite"),
        ({"real": REAL / 0}, "real features have NaN or infinite values in 300 of 300"),
        ({"real": FeatureStatistics.from_features(REAL[:, :5])}, "generated features have dimension 8"),
    ],
)
def test_errors_name_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        feature_metrics(**{"real": REAL, "generated": GENERATED, **changes})
