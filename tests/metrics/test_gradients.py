# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Gradients of every distance against differences of its exact `replaced`, and against autograd."""

import pytest
import torch

from trl_distreward.metrics.frechet import FrechetDistance
from trl_distreward.metrics.kernel import KernelDistance
from trl_distreward.metrics.statistics import FeatureStatistics

N, D, SIZE = 21, 4, 3


def sample(count, seed, dimension=D, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / 2
    mixing += torch.eye(dimension, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing + offset


def subsets(count, batch=2, size=SIZE):
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(batch)])


def frechet(real=None, **options):
    return FrechetDistance(
        FeatureStatistics.from_features(sample(30, 0, offset=0.3) if real is None else real), **options
    )


def kernel(**options):
    return KernelDistance(sample(30, 0, offset=0.3), **options)


GAUSSIAN = {"kernel": "gaussian", "bandwidths": (0.7, 2.0, 20.0)}
DISTANCES = {
    "fréchet": frechet,
    "fréchet, direct": lambda: frechet(method="direct"),
    "fréchet, logdet": lambda: frechet(method="logdet"),
    "kid": kernel,
    "kid, biased": lambda: kernel(unbiased=False),
    "gaussian": lambda: kernel(**GAUSSIAN),
    "gaussian, biased": lambda: kernel(**GAUSSIAN, unbiased=False),
}
every_distance = pytest.mark.parametrize("make", DISTANCES.values(), ids=DISTANCES)


def by_nuclear_norm(reference, real):
    """`replaced` as `|m - m_r|² + Tr S + Tr S_r - 2 |Z Z_rᵀ|_*`: differentiable, and exact below full rank too."""
    z_real = (real - real.mean(0)) / (len(real) - 1) ** 0.5

    def replaced(indices, features):
        sets = torch.stack([reference.index_put((i,), new) for i, new in zip(indices, features, strict=True)])
        mean = sets.mean(1)
        z = (sets - mean[:, None]) / (sets.shape[1] - 1) ** 0.5
        roots = torch.linalg.svdvals(z @ z_real.T)[:, : real.shape[1]].sum(1)
        return (mean - real.mean(0)).square().sum(1) + z.square().sum((1, 2)) + z_real.square().sum() - 2 * roots

    return replaced


def differences(replaced, indices, features, step=1e-3):
    """Central differences of `replaced` in every coordinate of each subset, of fourth order; (B, n, d)."""
    moves = torch.eye(features[0].numel(), dtype=torch.float64).view(-1, *features.shape[1:]) * step
    gradients = []
    for rows, new in zip(indices, features, strict=True):
        total = torch.zeros(len(moves), dtype=torch.float64)
        for far, weight in ((1, 8 / 12), (2, -1 / 12)):
            moved = torch.cat([new + far * moves, new - far * moves])
            above, below = replaced(rows.expand(len(moved), -1), moved).chunk(2)
            total += weight * (above - below) / step
        gradients.append(total.view_as(new))
    return torch.stack(gradients)


def assert_exact(distance, indices, features, step=1e-3, replaced=None):
    gradient = distance.gradient(indices, features)
    assert gradient.shape == features.shape and gradient.dtype == torch.float64
    expected = differences(replaced or distance.replaced, indices, features, step)
    error = (gradient - expected).norm() / expected.norm()
    assert error < 1e-6, f"off by {error:.1e}"


@every_distance
def test_gradient_equals_differences_of_replaced(make):
    assert_exact(make().fit(sample(N, 1)), subsets(N), sample(2 * SIZE, 2).view(2, SIZE, D), step=1e-5)


@every_distance
def test_subsets_are_independent_and_leave_no_graph(make):
    distance, indices, new = make().fit(sample(N, 1)), subsets(N), sample(2 * SIZE, 2).view(2, SIZE, D)
    gradient = distance.gradient(indices, new.requires_grad_())
    assert not gradient.requires_grad
    for b in range(2):
        torch.testing.assert_close(distance.gradient(indices[b : b + 1], new[b : b + 1])[0], gradient[b])
    single = new.detach().float()
    assert torch.equal(distance.gradient(indices, single), distance.gradient(indices, single.double()))


@pytest.mark.parametrize("name", DISTANCES)
def test_blocks_change_nothing(name, monkeypatch):
    distance, indices, new = DISTANCES[name]().fit(sample(N, 1)), subsets(N), sample(2 * SIZE, 2).view(2, SIZE, D)
    whole = distance.gradient(indices, new)
    for budget in (1, 300):  # block edges that the rows of a subset straddle
        for kind in (FrechetDistance, KernelDistance):
            monkeypatch.setattr(kind, "memory_budget", budget)
        torch.testing.assert_close(distance.gradient(indices, new), whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["fréchet", "fréchet, logdet", "kid", "gaussian"])
def test_gradient_is_exact_where_all_rows_but_one_are_replaced(name):
    indices = torch.arange(N)[None, 1:]
    assert_exact(DISTANCES[name]().fit(sample(N, 1)), indices, sample(N - 1, 2)[None], step=1e-5)


# (N, real rows): with d = 8 fewer rows than features in the set, the real data, both, one as far as the other
@pytest.mark.parametrize("method", ["direct", "logdet"])
@pytest.mark.parametrize(("count", "real"), [(30, 40), (6, 40), (30, 5), (7, 5), (6, 6), (5, 7)])
def test_frechet_gradient_is_exact_below_full_rank(count, real, method):
    distance = frechet(sample(real, 0, 8, offset=0.3), method=method).fit(sample(count, 1, 8))
    assert_exact(distance, subsets(count), sample(2 * SIZE, 2, 8).view(2, SIZE, 8))


def test_gradient_is_exact_for_moments_of_unknown_count_below_full_rank():
    """Statistics files of other libraries: only rounding tells which eigenvalues are 0."""
    real, reference = sample(5, 0, 8, offset=0.3), sample(30, 1, 8)
    moments = FeatureStatistics.from_features(real)
    distance = FrechetDistance(FeatureStatistics.from_moments(moments.mean, moments.covariance)).fit(reference)
    new = sample(2 * SIZE, 2, 8).view(2, SIZE, 8)
    assert_exact(distance, subsets(30), new, replaced=by_nuclear_norm(reference, real))


@pytest.mark.parametrize("method", ["direct", "logdet"])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_gradient_is_exact_at_repeated_eigenvalues(spread, method):
    """The updated set has covariance I and the real data a multiple of it."""
    rows = sample(N, 1)
    rows = torch.linalg.qr(rows - rows.mean(0))[0] * (N - 1) ** 0.5
    real = FeatureStatistics.from_moments(torch.full((D,), 0.3), spread * torch.eye(D))
    for indices in subsets(N).split(1):
        before, new = rows.clone(), rows[indices]
        before[indices[0]] = sample(SIZE, 2)
        assert_exact(FrechetDistance(real, method=method).fit(before), indices, new)


def collapsed(kind):
    """A set, replaced rows and new rows that leave it with a lower rank than its size allows."""
    if kind == "copies":  # in a set of no more rows than features
        new = sample(SIZE, 2, 8)
        new[1] = new[0]
        return sample(6, 1, 8), torch.tensor([[4, 0, 2]]), new[None]
    rows, new = sample(30, 1, 8), sample(SIZE, 2, 8)
    rows[:, 5] = new[:, 5] = 0.1
    return rows, subsets(30, 1), new[None]


@pytest.mark.parametrize("kind", ["copies", "a feature that does not vary"])
def test_a_collapsed_set_has_the_mean_of_its_one_sided_derivatives(kind):
    rows, indices, new = collapsed(kind)
    real = sample(40, 0, 8, offset=0.3)
    distance, replaced = frechet(real).fit(rows), by_nuclear_norm(rows, real)
    assert_exact(distance, indices, new, 1e-6, replaced)  # central differences: at a kink they err by the step
    move = torch.zeros_like(new)
    move[0, 0] = sample(1, 3, 8)[0]
    along = (distance.gradient(indices, new) * move).sum().item()
    ahead, back = ((replaced(indices, new + s * move) - replaced(indices, new)).item() / 1e-6 for s in (1e-6, -1e-6))
    assert ahead < along - 0.01 and back < -along - 0.01  # a kink whose rates are finite: it falls both ways
    assert ahead - along == pytest.approx(back + along, rel=1e-3)


def test_a_feature_that_does_not_vary_on_an_axis_of_the_real_data():
    """Rounding leaves an eigenvalue of 1e-16 there, which would cost half of the digits if it counted."""
    real = FeatureStatistics.from_moments(torch.zeros(8), torch.diag(torch.arange(1.0, 9.0)))
    rows, indices, new = collapsed("a feature that does not vary")
    gradient = FrechetDistance(real).fit(rows).gradient(indices, new)
    expected = torch.full((1, SIZE), 2 / 30 * 0.1, dtype=torch.float64)
    torch.testing.assert_close(gradient[..., 5], expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("options", [{}, GAUSSIAN])
def test_kernel_gradient_is_exact_far_from_the_origin_and_with_copies(options, unbiased):
    real, reference = sample(30, 0, offset=10.0), sample(N, 1, offset=10.3)
    indices, new = subsets(N), sample(2 * SIZE, 2, offset=10.0).view(2, SIZE, D)
    new[0, 1], new[1, 0] = new[0, 0], reference[indices[0, 0]]
    assert_exact(KernelDistance(real, unbiased=unbiased, **options).fit(reference), indices, new)


@every_distance
@pytest.mark.parametrize("method", ["replaced", "leave_one_in", "gradient"])
def test_wrong_replacements_are_refused(make, method):
    distance, new = make().fit(sample(N, 1)), torch.zeros(1, 2, D)
    cases = [
        (torch.tensor([[0, 0]]), new, "same row twice"),
        (torch.tensor([[0, N]]), new, f"0 to {N - 1}"),
        (torch.tensor([[0, 1, 2]]), new, r"\(B, n\) and \(B, n, d\)"),
        (torch.tensor([[0, 1]]), new / 0, "NaN or infinite"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 2, D + 1), f"dimension {D + 1}"),
    ]
    for indices, features, message in cases:
        with pytest.raises(ValueError, match=message):
            getattr(distance, method)(indices, features)


@every_distance
def test_wrong_reference_sets_are_refused(make):
    for features, message in ((sample(N, 1, D + 1), f"dimension {D + 1}"), (sample(1, 1), "at least 2")):
        with pytest.raises(ValueError, match=message):
            make().fit(features)
