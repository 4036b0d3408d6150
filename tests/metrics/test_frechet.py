# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import scipy.linalg
import torch

from trl_distreward import FeatureStatistics, FrechetDistance, frechet_distance


def correlated(count, dimension, seed, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing * scale + offset


def with_scipy(a, b):
    """The textbook formula with scipy's general matrix square root."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)


def with_nuclear_norm(a, b):
    """The same without a matrix square root: Tr (S_a S_b)^½ is the nuclear norm of the centred rows' product."""
    z_a, z_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    nuclear = np.linalg.svd(z_a @ z_b.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (z_a**2).sum() + (z_b**2).sum() - 2 * nuclear


def distance_of(a, b):
    return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))


def test_equals_scipy_on_full_rank_sets():
    a, b = correlated(300, 20, 0), correlated(400, 20, 1, offset=0.5, scale=1.2)
    assert distance_of(a, b) == pytest.approx(with_scipy(a.numpy(), b.numpy()), rel=1e-8)
    assert distance_of(a, b) == pytest.approx(distance_of(b, a), rel=1e-12)
    assert distance_of(a, a) == pytest.approx(0.0, abs=1e-9)


def test_closed_form_of_commuting_gaussians():
    a = FeatureStatistics.from_moments(torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([4.0, 1.0])))
    b = FeatureStatistics.from_moments(torch.tensor([0.0, 2.0]), torch.diag(torch.tensor([1.0, 9.0])))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2)


@pytest.mark.parametrize(
    ("generated", "real", "dimension"), [(200, 300, 24), (40, 300, 64), (200, 30, 64), (40, 30, 64)]
)
def test_replaced_is_a_full_recompute_also_below_full_rank(generated, real, dimension):
    reference, target = correlated(generated, dimension, 2), correlated(real, dimension, 3, offset=0.3)
    distance = FrechetDistance(FeatureStatistics.from_features(target)).fit(reference)
    assert distance.value == pytest.approx(with_nuclear_norm(reference.numpy(), target.numpy()), rel=1e-8)
    indices = torch.stack([torch.randperm(generated)[:5] for _ in range(6)])
    new = correlated(30, dimension, 4).view(6, 5, dimension)
    distances = distance.replaced(indices, new)
    assert distances.dtype == torch.float64 and distances.shape == (6,)
    for b in range(6):
        changed = reference.clone()
        changed[indices[b]] = new[b]
        assert distances[b].item() == pytest.approx(with_nuclear_norm(changed.numpy(), target.numpy()), rel=1e-8)
        if dimension < min(generated, real):
            assert distances[b].item() == pytest.approx(with_scipy(changed.numpy(), target.numpy()), rel=1e-8)


def test_chunks_change_nothing():
    distance = FrechetDistance(FeatureStatistics.from_features(correlated(90, 8, 0))).fit(correlated(60, 8, 1))
    indices, new = torch.arange(20).view(10, 2), correlated(20, 8, 2).view(10, 2, 8)
    whole = distance.replaced(indices, new)
    distance.memory_budget = 1
    torch.testing.assert_close(distance.replaced(indices, new), whole, rtol=1e-13, atol=0)


def test_replacing_rows_by_themselves_changes_nothing():
    reference = correlated(60, 8, 1)
    distance = FrechetDistance(FeatureStatistics.from_features(correlated(90, 8, 0))).fit(reference)
    indices = torch.arange(6).view(2, 3)
    torch.testing.assert_close(
        distance.replaced(indices, reference[indices]), torch.full((2,), distance.value, dtype=torch.float64)
    )


def test_errors():
    real = FeatureStatistics.from_features(correlated(50, 4, 0))
    distance = FrechetDistance(real)
    with pytest.raises(ValueError, match="call fit"):
        distance.replaced(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="dimension 5"):
        distance.fit(correlated(20, 5, 1))
    with pytest.raises(ValueError, match="at least 2"):
        distance.fit(correlated(1, 4, 1))
    distance.fit(correlated(20, 4, 1))
    cases = [
        (torch.tensor([[0, 0]]), torch.zeros(1, 2, 4), "same row twice"),
        (torch.tensor([[0, 20]]), torch.zeros(1, 2, 4), "0 to 19"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 3, 4), r"\(B, n\) and \(B, n, d\)"),
        (torch.arange(20)[None], torch.zeros(1, 20, 4), "replace_size=20"),
        (torch.tensor([[0]]), torch.full((1, 1, 4), float("inf")), "NaN or infinite"),
    ]
    for indices, features, message in cases:
        with pytest.raises(ValueError, match=message):
            distance.replaced(indices, features)
    with pytest.raises(ValueError, match="dimensions 4 and 5"):
        frechet_distance(real, FeatureStatistics.from_features(correlated(20, 5, 1)))
