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


def logdet(real, reference, **kwargs):
    return FrechetDistance(FeatureStatistics.from_features(real), method="logdet", **kwargs).fit(reference)


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


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("make", [correlated, heavy_tailed])
@pytest.mark.parametrize(("generated", "real", "dimension"), SHAPES)
def test_logdet_is_a_full_recompute(generated, real, dimension, make, size):
    reference, target = make(generated, dimension, 2), make(real, dimension, 3, offset=0.1)
    new = make(6 * size, dimension, 4, offset=0.02).view(6, size, dimension)
    indices = subsets(generated, 6, size)
    distance = logdet(target, reference)
    distances = distance.replaced(indices, new)
    assert distances.dtype == torch.float64 and distances.shape == (6,)
    assert 0 < distance.error_bound  # eigenvalues took no part
    for b in range(6):
        full = exact(changed(reference, indices[b], new[b]), target)
        assert distances[b].item() == pytest.approx(full, rel=2e-8)
        assert abs(distances[b].item() - full) < distance.error_bound + 1e-8 * full


@pytest.mark.parametrize("num_nodes", [6, 12, 18])
def test_error_stays_below_the_a_priori_bound(num_nodes):
    reference, target = heavy_tailed(300, 40, 2), heavy_tailed(300, 40, 3, offset=0.1)
    new, indices = heavy_tailed(30, 40, 4).view(6, 5, 40), subsets(300, 6, 5)
    distance = logdet(target, reference, num_nodes=num_nodes)
    distance.check_tolerance = 1.0  # no falling back
    errors = distance.replaced(indices, new) - torch.tensor(
        [exact(changed(reference, i, x), target) for i, x in zip(indices, new, strict=True)]
    )
    assert 0 < errors.abs().max().item() < distance.error_bound


def test_too_few_nodes_warn_and_fall_back_to_eigenvalues():
    reference, target = heavy_tailed(300, 40, 2), heavy_tailed(300, 40, 3, offset=0.1)
    new, indices = heavy_tailed(30, 40, 4).view(6, 5, 40), subsets(300, 6, 5)
    distance = logdet(target, reference, num_nodes=3)
    with pytest.warns(
        UserWarning, match=r"off by .* above .*a-priori bound .* eigenvalues are used until the next fit"
    ):
        distances = distance.replaced(indices, new)
    statistics = FeatureStatistics.from_features(target)
    direct = FrechetDistance(statistics, method="direct").fit(reference)
    torch.testing.assert_close(distances, direct.replaced(indices, new), rtol=1e-12, atol=0)
    credits = distance.leave_one_in(indices, new)  # no second warning
    torch.testing.assert_close(credits, direct.leave_one_in(indices, new), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(credits, logdet(target, reference).leave_one_in(indices, new), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_far_out_of_range(dtype):
    reference, target = heavy_tailed(300, 80, 2), heavy_tailed(300, 80, 3, offset=0.1)
    new, indices = 30 * heavy_tailed(30, 80, 4).view(6, 5, 80), subsets(300, 6, 5)
    distance = logdet(target, reference, dtype=dtype)
    if dtype == torch.float32:  # too coarse for this, and the check of one subset says so
        with pytest.warns(UserWarning, match="eigenvalues are used until the next fit"):
            distances = distance.replaced(indices, new)
    else:
        distance._checked, distance._direct = True, None  # the quadrature has to do
        distances = distance.replaced(indices, new)
    for b in range(6):
        full = exact(changed(reference, indices[b], new[b]), target)
        assert distances[b].item() == pytest.approx(full, rel=1e-8)


@pytest.mark.parametrize(("generated", "real", "dimension"), [(70, 300, 64), (40, 300, 64)])
def test_a_subset_that_collapses(generated, real, dimension):
    """Copies of one image leave A with eigenvalues, or a rank, far below those that the rule was made for."""
    reference, target = correlated(generated, dimension, 2), correlated(real, dimension, 3)
    indices = subsets(generated, 3, 20)
    new = reference.mean(0) + torch.zeros(3, 20, dimension, dtype=torch.float64)
    new[0] = correlated(20, dimension, 4)  # the one that is checked
    distances = logdet(target, reference).replaced(indices, new)
    for b in range(3):
        assert distances[b].item() == pytest.approx(exact(changed(reference, indices[b], new[b]), target), rel=1e-7)


@pytest.mark.parametrize("dimension", [8, 300])
def test_logdet_chunks_change_nothing(dimension):
    distance = logdet(heavy_tailed(400, dimension, 0), heavy_tailed(350, dimension, 1))
    for size in (2, 5):
        indices, new = subsets(350, 10, size), heavy_tailed(10 * size, dimension, 2).view(10, size, dimension)
        distance.memory_budget = 2**28
        whole, credits = distance.replaced(indices, new), distance.leave_one_in(indices, new)
        distance.memory_budget = 1
        torch.testing.assert_close(distance.replaced(indices, new), whole, rtol=1e-11, atol=0)
        torch.testing.assert_close(distance.leave_one_in(indices, new), credits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("generated", "real", "dimension"), SHAPES)
def test_credits_are_full_recomputes(generated, real, dimension):
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
    for x, change in zip(new[0], distance.add_one(new[0]), strict=True):
        assert change.item() == pytest.approx(exact(torch.cat([reference, x[None]]), target) - value, abs=tolerance)


def test_copies_of_one_image_are_paid_by_add_one_but_not_by_leave_one_in():
    rows = correlated(2300, 30, 0)
    target, reference = rows[:2000], rows[2000:] + 0.8
    distance = logdet(target, reference)
    image = target.mean(0) + 0.2 * (rows[7] - target.mean(0))
    copies, indices = image.expand(1, 50, 30), subsets(300, 1, 50)
    assert distance.add_one(copies[0]).sum() < 0
    assert distance.replaced(indices, copies).item() > distance.value
    assert distance.leave_one_in(indices, copies).sum() > 0


def test_moments_do_not_drift_over_ten_thousand_replacements():
    generator = torch.Generator().manual_seed(5)
    target, features = correlated(200, 12, 0), correlated(100, 12, 1)
    distance = logdet(target, features)
    for start in range(0, 10_000, 50):
        rows = torch.randperm(100, generator=generator)[:50]
        features[rows] = correlated(50, 12, start + 2) * (1 + start / 1000)
        distance.fit(features)
    features = features / features.std() + 1e3  # an offset that sums of squares would not survive
    assert distance.fit(features).value == pytest.approx(exact(features, target), rel=1e-9)


def test_float32_products():
    reference, target = heavy_tailed(600, 300, 2), heavy_tailed(600, 300, 3, offset=0.1)
    new, indices = heavy_tailed(60, 300, 4).view(6, 10, 300), subsets(600, 6, 10)
    double, single = logdet(target, reference), logdet(target, reference, dtype=torch.float32)
    expected = double.replaced(indices, new)
    errors = single.replaced(indices, new) - expected
    assert 0 < errors.abs().max() < 1e-4 * expected.std()
    assert single.features.dtype == torch.float32


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
    for method, nodes, message in (("fast", None, "method='fast'"), ("logdet", 4, "num_nodes=4")):
        with pytest.raises(ValueError, match=message):
            FrechetDistance(real, method=method, num_nodes=nodes)
    with pytest.raises(ValueError, match="dtype"):
        FrechetDistance(real, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="from 0 to 19"):
        distance.delete_one(torch.tensor([20]))
    with pytest.raises(ValueError, match="at least 3"):
        FrechetDistance(real).fit(correlated(2, 4, 1)).delete_one(torch.tensor([0]))
