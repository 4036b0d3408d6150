# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from safetensors.torch import save_file

from trl_distreward.metrics.sliced import SlicedWassersteinDistance
from trl_distreward.metrics.statistics import FeatureStatistics

N, M, D, L = 24, 30, 5, 7


def sample(count, seed, dimension=D, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


REAL, GENERATED = sample(M, 0, offset=1.0), sample(N, 1)
NEW = sample(12, 2).view(3, 4, D)
INDICES = torch.tensor([[8, 0, 23, 5], [1, 7, 2, 9], [20, 3, 11, 15]])
GENERATED[3] = GENERATED[8]  # ties: within the set, within a subset, between them
NEW[0, 1] = NEW[0, 0]
NEW[1, 2] = GENERATED[3]
NEW[2, 0] = GENERATED[INDICES[2, 0]]


def naive(generated, projections, real=REAL):
    """Both sets repeated to the least common multiple of their sizes, where W2² is a mean over sorted pairs."""
    size = math.lcm(len(generated), len(real))
    x, r = ((rows @ projections).repeat_interleave(size // len(rows), 0).sort(0).values for rows in (generated, real))
    return (x - r).square().mean().item()


def without(rows, i):
    return torch.cat([rows[:i], rows[i + 1 :]])


@pytest.mark.parametrize("count", [M, 7, 1])  # as many real rows as generated ones, fewer, one
def test_value_for_any_sizes(count):
    distance = SlicedWassersteinDistance(REAL[:count], L).fit(GENERATED)
    assert distance.value == pytest.approx(naive(GENERATED, distance.projections, REAL[:count]), rel=1e-12)
    torch.testing.assert_close(distance.projections.norm(dim=0), torch.ones(L, dtype=torch.float64))


def test_every_value_is_a_full_recompute():
    distance = SlicedWassersteinDistance(REAL, L)
    assert distance.features is None and distance.dimension == D
    distance.fit(GENERATED)

    def oracle(rows):
        return naive(rows, distance.projections)

    close = {"rel": 1e-9, "abs": 1e-14}
    replaced, credits = distance.replaced(INDICES, NEW), distance.leave_one_in(INDICES, NEW)
    assert replaced.dtype == credits.dtype == torch.float64
    for b in range(3):
        changed = GENERATED.clone()
        changed[INDICES[b]] = NEW[b]
        assert replaced[b].item() == pytest.approx(oracle(changed), rel=1e-12)
        expected = [oracle(changed) - oracle(without(changed, row)) for row in INDICES[b].tolist()]
        assert credits[b].tolist() == pytest.approx(expected, **close)
    value = oracle(GENERATED)
    expected = [oracle(without(GENERATED, i)) - value for i in range(N)]
    assert distance.delete_one(torch.arange(N)).tolist() == pytest.approx(expected, **close)
    expected = [oracle(torch.cat([GENERATED, row[None]])) - value for row in NEW[1]]
    assert distance.add_one(NEW[1]).tolist() == pytest.approx(expected, **close)


def test_chunks_change_nothing():
    def everything():
        distance = SlicedWassersteinDistance(REAL, L).fit(GENERATED)
        yield torch.tensor(distance.value)
        yield distance.replaced(INDICES, NEW)
        yield distance.leave_one_in(INDICES, NEW)
        yield distance.delete_one(torch.arange(N))
        yield distance.add_one(NEW[0])

    whole = list(everything())
    for budget in (1, 2500):  # one projection at a time; a few
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlicedWassersteinDistance, "memory_budget", budget)
            for small, large in zip(everything(), whole, strict=True):
                torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-14)


def test_a_shift_costs_its_square_and_equal_sets_nothing():
    distance = SlicedWassersteinDistance(REAL, 4000)
    assert distance.fit(REAL).value == pytest.approx(0, abs=1e-14)
    shift = torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    assert distance.fit(REAL + shift).value == pytest.approx(9 / D, rel=0.1)  # E (θ·s)² = |s|²/d
    assert SlicedWassersteinDistance(REAL + 1e6, L).fit(REAL + 1e6 + shift).value == pytest.approx(
        SlicedWassersteinDistance(REAL, L).fit(REAL + shift).value, rel=1e-8
    )


def test_directions_follow_the_seed():
    values = [SlicedWassersteinDistance(REAL, L, seed).fit(GENERATED).value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_real_features_from_a_file(tmp_path):
    save_file({"features": REAL}, tmp_path / "real.safetensors")
    read = SlicedWassersteinDistance(tmp_path / "real.safetensors", L).fit(GENERATED)
    assert read.value == SlicedWassersteinDistance(REAL, L).fit(GENERATED).value


def test_errors():
    with pytest.raises(TypeError, match="SlicedWassersteinDistance compares with the real features themselves"):
        SlicedWassersteinDistance(FeatureStatistics.from_features(REAL))
    with pytest.raises(ValueError, match="num_projections=0"):
        SlicedWassersteinDistance(REAL, 0)
    distance = SlicedWassersteinDistance(REAL, L)
    with pytest.raises(ValueError, match="call fit"):
        distance.add_one(NEW[0])
    with pytest.raises(ValueError, match="dimension 4"):
        distance.fit(GENERATED[:, :4])
    with pytest.raises(ValueError, match="at least 2"):
        distance.fit(GENERATED[:1])
    distance.fit(GENERATED)
    with pytest.raises(ValueError, match="replace_size=24"):
        distance.leave_one_in(torch.arange(N)[None], GENERATED[None])
    with pytest.raises(ValueError, match="NaN or infinite"):
        distance.add_one(torch.full((1, D), float("inf")))
    with pytest.raises(ValueError, match="0 to 23"):
        distance.delete_one(torch.tensor([-1]))
