# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import scipy.linalg
import torch

from trl_distreward import FeatureStatistics, FrechetDistance, frechet_distance
from trl_distreward.metrics import frechet_replacement


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
    """The same by the nuclear norm of the centred rows' product, which is Tr (S_a S_b)^½."""
    z_a, z_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    nuclear = np.linalg.svd(z_a @ z_b.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (z_a**2).sum() + (z_b**2).sum() - 2 * nuclear


def heavy_tailed(count, dimension, seed, offset=0.0, condition=1e6):
    """Student-t rows whose covariance has about this condition number."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    rows /= torch.randn(count, 8, generator=generator, dtype=torch.float64).square().mean(1, keepdim=True).sqrt()
    basis = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=generator))[0]
    return (rows * torch.logspace(0, -0.5, dimension, condition, dtype=torch.float64)) @ basis + offset


def subsets(count, batch, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(batch)])


def changed(reference, indices, new):
    result = reference.clone()
    result[indices] = new
    return result


def without(reference, row):
    return torch.cat([reference[:row], reference[row + 1 :]])


def logdet(real, reference):
    return FrechetDistance(FeatureStatistics.from_features(real), method="logdet").fit(reference)


def exact(a, b):
    return with_nuclear_norm(a.numpy(), b.numpy())


# (N, real rows, d): full rank; fewer rows than features in the set, in the real data, in both
SHAPES = [(200, 300, 24), (40, 300, 64), (200, 30, 64), (40, 30, 64)]


def distance_of(a, b):
    return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))


def test_equals_scipy_on_full_rank_sets():
    a, b = correlated(300, 20, 0), correlated(400, 20, 1, offset=0.5, scale=1.2)
    assert distance_of(a, b) == pytest.approx(with_scipy(a.numpy(), b.numpy()), rel=1e-8)
    assert distance_of(a, b) == pytest.approx(distance_of(b, a), rel=1e-12)
    assert distance_of(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("method", ["direct", "logdet"])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("make", [correlated, heavy_tailed])
@pytest.mark.parametrize(("generated", "real", "dimension"), SHAPES)
def test_replaced_equals_a_full_recompute(generated, real, dimension, make, size, method, monkeypatch):
    reference, target = make(generated, dimension, 2), make(real, dimension, 3, offset=0.1)
    new = make(6 * size, dimension, 4, offset=0.02).view(6, size, dimension)
    indices = subsets(generated, 6, size)
    distance = FrechetDistance(FeatureStatistics.from_features(target), method=method).fit(reference)
    assert distance.value == pytest.approx(exact(reference, target), rel=1e-8)
    if method == "logdet":
        monkeypatch.setattr(distance.reference_set, "replaced", None)  # no subset fails
    distances = distance.replaced(indices, new)
    assert distances.dtype == torch.float64 and distances.shape == (6,)
    for b in range(6):
        full = exact(changed(reference, indices[b], new[b]), target)
        assert distances[b].item() == pytest.approx(full, rel=2e-8)


def test_failed_subsets_are_computed_from_eigenvalues(monkeypatch):
    reference, target = heavy_tailed(300, 40, 2), heavy_tailed(300, 40, 3, offset=0.1)
    new, indices = heavy_tailed(30, 40, 4).view(6, 5, 40), subsets(300, 6, 5)
    direct = FrechetDistance(FeatureStatistics.from_features(target), method="direct").fit(reference)
    monkeypatch.setattr(frechet_replacement, "CHECK_TOLERANCE", -1.0)  # distrusts every subset
    distance = logdet(target, reference)
    torch.testing.assert_close(distance.replaced(indices, new), direct.replaced(indices, new), rtol=1e-12, atol=0)
    credits = distance.leave_one_in(indices, new)
    torch.testing.assert_close(credits, direct.leave_one_in(indices, new), rtol=1e-10, atol=1e-12)


def far_out():
    return heavy_tailed(300, 80, 2), heavy_tailed(300, 80, 3, offset=0.1), 30 * heavy_tailed(30, 80, 4).view(6, 5, 80)


def unvaried():
    """Units that no generated image activates, but real and new images do."""
    reference = correlated(300, 80, 2)
    reference[:, :10] = 0
    return reference, correlated(400, 80, 3), correlated(30, 80, 4).view(6, 5, 80)


def collapsed(count):
    """Copies of one image leave A with eigenvalues, or a rank, far below the quadrature's interval."""
    reference = correlated(count, 64, 2)
    new = reference.mean(0) + torch.zeros(3, 20, 64, dtype=torch.float64)
    new[0] = correlated(20, 64, 4)
    return reference, correlated(300, 64, 3), new


@pytest.mark.parametrize(
    ("case", "rel"), [(far_out(), 1e-8), (unvaried(), 1e-8), (collapsed(70), 1e-7), (collapsed(40), 1e-7)]
)
def test_extreme_features_keep_their_digits(case, rel):
    reference, target, new = case
    indices = subsets(len(reference), *new.shape[:2])
    distances = logdet(target, reference).replaced(indices, new)
    for found, rows, images in zip(distances.tolist(), indices, new, strict=True):
        assert found == pytest.approx(exact(changed(reference, rows, images), target), rel=rel)


@pytest.mark.parametrize(("method", "dimension"), [("direct", 8), ("logdet", 8), ("logdet", 300)])
def test_chunks_change_nothing(method, dimension):
    real = FeatureStatistics.from_features(heavy_tailed(400, dimension, 0))
    distance = FrechetDistance(real, method=method).fit(heavy_tailed(350, dimension, 1))
    for size in (2, 5):
        indices, new = subsets(350, 10, size), heavy_tailed(10 * size, dimension, 2).view(10, size, dimension)
        distance.memory_budget = 2**28
        whole, credits = distance.replaced(indices, new), distance.leave_one_in(indices, new)
        distance.memory_budget = 1
        torch.testing.assert_close(distance.replaced(indices, new), whole, rtol=1e-11, atol=0)
        torch.testing.assert_close(distance.leave_one_in(indices, new), credits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("generated", "real", "dimension"), SHAPES)
def test_credits_equal_full_recomputes(generated, real, dimension):
    reference, target = correlated(generated, dimension, 2), correlated(real, dimension, 3, offset=0.3)
    indices, new = subsets(generated, 3, 4), correlated(12, dimension, 4, offset=0.1).view(3, 4, dimension)
    distance = logdet(target, reference)
    value = exact(reference, target)
    tolerance = 1e-7 * value
    inside = distance.leave_one_in(indices, new)
    for b in range(3):
        after = changed(reference, indices[b], new[b])
        for j in range(4):
            expected = exact(after, target) - exact(without(after, indices[b, j]), target)
            assert inside[b, j].item() == pytest.approx(expected, abs=tolerance)
    rows = torch.tensor([0, 5, generated - 1])
    for i, change in zip(rows, distance.delete_one(rows), strict=True):
        assert change.item() == pytest.approx(exact(without(reference, i), target) - value, abs=tolerance)
