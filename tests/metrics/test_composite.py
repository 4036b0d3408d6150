# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from trl_distreward.metrics.composite import DebiasedDistance, SumDistance
from trl_distreward.metrics.frechet import FrechetDistance
from trl_distreward.metrics.kernel import KernelDistance
from trl_distreward.metrics.sliced import SlicedWassersteinDistance
from trl_distreward.metrics.statistics import FeatureStatistics

N, D = 24, 4


def sample(count, seed, dimension=D, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


REAL, GENERATED = sample(40, 0, offset=1.0), sample(N + 1, 1)
NEW = sample(30, 2).view(5, 6, D)


def kernel():
    return KernelDistance(REAL, "gaussian", bandwidths=(1.0, 3.0), unbiased=False)


def sliced():
    return SlicedWassersteinDistance(REAL, 5)


def without(rows, i):
    return torch.cat([rows[:i], rows[i + 1 :]])


# ---- sum ----


def test_sum_is_the_weighted_sum_of_every_method():
    members = [kernel().fit(GENERATED), sliced().fit(GENERATED)]
    total = SumDistance({"mmd": kernel(), "sw": sliced()}, {"sw": 0.5, "mmd": 3.0})
    assert total.features is None and total.dimension == D
    total.fit(GENERATED)
    assert total.value == pytest.approx(3 * members[0].value + 0.5 * members[1].value)
    indices = torch.arange(30).view(5, 6) % N
    for method, arguments in [
        ("replaced", (indices, NEW)),
        ("leave_one_in", (indices, NEW)),
        ("gradient", (indices, NEW)),
        ("delete_one", (torch.arange(N),)),
        ("add_one", (NEW[0],)),
    ]:
        parts = [getattr(member, method)(*arguments) for member in members]
        torch.testing.assert_close(getattr(total, method)(*arguments), 3 * parts[0] + 0.5 * parts[1])


def test_a_list_is_named_by_number():
    total = SumDistance([kernel(), sliced()], [2.0, 1.0]).fit(GENERATED)
    assert total.weights == {"0": 2.0, "1": 1.0} and total.scales == {}


def test_normalized_sum_keeps_its_first_scales():
    total = SumDistance({"mmd": kernel(), "sw": sliced()}, {"mmd": 1.0, "sw": 4.0}, normalize=True).fit(GENERATED)
    first = {name: distance.value for name, distance in total.distances.items()}
    assert total.value == pytest.approx(5.0) and total.scales == first
    total.fit(GENERATED + 0.5)
    assert total.scales == first
    later = {name: distance.value for name, distance in total.distances.items()}
    assert total.value == pytest.approx(later["mmd"] / first["mmd"] + 4 * later["sw"] / first["sw"])
    resumed = SumDistance({"mmd": kernel(), "sw": sliced()}, {"mmd": 1.0, "sw": 4.0}, normalize=True)
    resumed.scales = total.scales
    assert resumed.fit(GENERATED + 0.5).value == total.value
    resumed.scales = {"mmd": 1.0, "sw": 1.0}  # of a fitted one too
    assert resumed.value == pytest.approx(later["mmd"] + 4 * later["sw"])


def test_sum_errors():
    cases = [
        (({},), "at least one"),
        (({"a": kernel()}, {"b": 1.0}), "give one each"),
        (([kernel()], [-1.0]), "at least 0"),
        (([kernel()], [0.0]), "not all 0"),
        (([kernel(), KernelDistance(sample(9, 0, 2))],), "one feature space"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            SumDistance(*arguments)
    total = SumDistance({"a": kernel()}, normalize=True)
    with pytest.raises(ValueError, match="call fit"):
        total.delete_one(torch.tensor([0]))
    with pytest.raises(ValueError, match="give one each"):
        total.scales = {"b": 1.0}
    with pytest.raises(ValueError, match="not positive"):
        total.scales = {"a": 0.0}
    equal = SumDistance([KernelDistance(REAL)], normalize=True)
    with pytest.raises(ValueError, match="not positive"):
        equal.fit(REAL)  # the unbiased MMD² of a set with itself is negative
    debiased = SumDistance([DebiasedDistance(kernel)]).fit(GENERATED)
    with pytest.raises(AttributeError, match="add_one"):
        debiased.add_one(NEW[0])


# ---- debiased ----


def parts_of(distance, rows):
    """Members' distances of the rows, (whole, half, half), each from scratch; `rows` maps row numbers to features."""
    halves = [[row for row in half.tolist() if row in rows] for half in distance._members]
    sets = [list(rows), *halves]
    return [sliced().fit(torch.stack([rows[row] for row in members])).value for members in sets]


def from_scratch(distance, rows):
    whole, first, second = parts_of(distance, rows)
    return 2 * whole - 0.5 * (first + second)


@pytest.mark.parametrize("count", [N, N + 1])  # an odd set leaves one row out of the halves
@pytest.mark.parametrize("seed", [0, 5])
def test_every_value_is_a_full_recompute(count, seed):
    distance = DebiasedDistance(sliced, seed)
    assert distance.features is None and distance.dimension == D and not hasattr(distance, "add_one")
    reference = GENERATED[:count].float()
    distance.fit(reference)
    first, second = (set(half.tolist()) for half in distance._members)
    assert len(first) == len(second) == N // 2 and not first & second
    neither = set(range(count)) - first - second
    rows = dict(enumerate(reference.double()))
    value = from_scratch(distance, rows)
    close = {"rel": 1e-9, "abs": 1e-13}
    assert distance.value == pytest.approx(value, **close)

    # subsets with different shares of the halves: all in one, none in it, mixed, with the row in neither
    one, two = sorted(first), sorted(second)
    subsets = [one[:6], two[3:9], one[:3] + two[:3], [two[0], one[4], two[5], one[0], two[1], two[2]]]
    subsets.append([*neither, *one[: 3 - len(neither)], *two[:3]])
    indices = torch.tensor(subsets)
    replaced, credits = distance.replaced(indices, NEW), distance.leave_one_in(indices, NEW)
    assert replaced.shape == (5,) and credits.shape == (5, 6) and credits.dtype == torch.float64
    for b, subset in enumerate(subsets):
        changed = rows | dict(zip(subset, NEW[b], strict=True))
        assert replaced[b].item() == pytest.approx(from_scratch(distance, changed), **close)
        for j, row in enumerate(subset):
            fewer = {k: v for k, v in changed.items() if k != row}
            expected = from_scratch(distance, changed) - from_scratch(distance, fewer)
            assert credits[b, j].item() == pytest.approx(expected, **close)
    alone = torch.tensor([one[:6]])  # no subset of the batch touches the other half
    torch.testing.assert_close(distance.replaced(alone, NEW[:1]), replaced[:1])
    torch.testing.assert_close(distance.leave_one_in(alone, NEW[:1]), credits[:1])
    wide = torch.tensor([one[:-1]])  # as many as a half can lose
    changed = rows | dict(zip(one[:-1], sample(11, 9), strict=True))
    assert distance.replaced(wide, sample(11, 9)[None]).item() == pytest.approx(
        from_scratch(distance, changed), **close
    )
    expected = [from_scratch(distance, {k: v for k, v in rows.items() if k != row}) - value for row in range(count)]
    assert distance.delete_one(torch.arange(count)).tolist() == pytest.approx(expected, **close)


def test_fillers_are_distinct_rows_the_subset_leaves_alone():
    """A wide and a narrow subset in one batch: the narrow one is filled up from what it does not touch."""
    distance = DebiasedDistance(sliced).fit(GENERATED[:N])
    one, two = (sorted(half.tolist()) for half in distance._members)
    for narrow in (one[:5] + two[:6], one[-5:] + two[:6], one[::3] + two[:7]):
        indices, new = torch.tensor([one[:11], narrow]), sample(22, 4).view(2, 11, D)
        apart = torch.cat([distance.replaced(indices[b : b + 1], new[b : b + 1]) for b in range(2)])
        torch.testing.assert_close(distance.replaced(indices, new), apart)


def test_copies_share_the_real_side():
    base = kernel()
    shared = DebiasedDistance(lambda: copy.copy(base)).fit(GENERATED)
    assert shared.value == DebiasedDistance(kernel).fit(GENERATED).value and base.features is None


def unit_gaussian(dimension):
    return FeatureStatistics.from_moments(
        torch.zeros(dimension, dtype=torch.float64), torch.eye(dimension, dtype=torch.float64)
    )


def plain_and_debiased(rows, real):
    """Fréchet distance of the rows, as it is and extrapolated, (2,)."""
    debiased = DebiasedDistance(lambda: FrechetDistance(real)).fit(rows)
    return torch.tensor([debiased.whole.value, debiased.value], dtype=torch.float64)


def test_removes_the_bias_of_finite_sets():
    """A unit Gaussian moved by 0.5 along one axis has FD 0.25; 64 rows in 6 dimensions show 0.52 on average."""
    real, shift = unit_gaussian(6), torch.tensor([0.5, 0, 0, 0, 0, 0], dtype=torch.float64)
    values = torch.stack([plain_and_debiased(sample(64, s, 6) + shift, real) for s in range(150)])
    plain, debiased = (values.mean(dim=0) - 0.25).tolist()
    assert plain > 0.15
    assert abs(debiased) < plain / 5


def test_debiasing_removes_the_reward_for_shrinking():
    """Of a model that matches the real data, the plain distance of 32 rows falls when its spread shrinks by 3 %."""
    real = unit_gaussian(8)
    sets = [sample(32, seed, 8) for seed in range(150)]
    changes = torch.stack([plain_and_debiased(x * 0.97, real) - plain_and_debiased(x, real) for x in sets])
    plain, debiased = changes.mean(dim=0).tolist()
    error = (changes.std(dim=0) / 150**0.5).tolist()
    assert plain < -3 * error[0]
    assert debiased > 2 * error[1]  # and truly 8 · 0.03² = 0.0072


def test_debiased_errors():
    one = kernel()
    with pytest.raises(ValueError, match="make a new one"):
        DebiasedDistance(lambda: one)
    with pytest.raises(ValueError, match="normalized sums"):
        DebiasedDistance(lambda: SumDistance([kernel()], normalize=True))
    distance = DebiasedDistance(kernel)
    with pytest.raises(ValueError, match="call fit"):
        distance.replaced(torch.zeros(1, 1, dtype=torch.long), NEW[:1, :1])
    with pytest.raises(ValueError, match="at least 4, so give 8"):
        distance.fit(GENERATED[:7])
    distance.fit(GENERATED[:8])
    with pytest.raises(ValueError, match="replaces all 4 rows of a half"):
        distance.replaced(distance._members[:1], NEW[:1, :4])
    with pytest.raises(ValueError, match="same row twice"):
        distance.replaced(torch.tensor([[0, 0]]), NEW[:1, :2])
    with pytest.raises(ValueError, match="0 to 7"):
        distance.delete_one(torch.tensor([8]))
