# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from trl_distreward.merging.search import CMASearch, GridSearch, power_profile_grid

START = torch.zeros(1, 4, dtype=torch.float64)
TARGET = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)
KINDS = ["grid", "cma"]


def new(kind):
    if kind == "grid":
        return GridSearch(torch.stack([START, TARGET / 2, TARGET, 2 * TARGET]))
    return CMASearch(START, 0.3, count=6, seed=1)


def reward(samples):
    return -((samples - TARGET) ** 2).sum((1, 2))


def advance(search, steps, level=0.0, skipped=()):
    for step in steps:
        samples = search.ask()
        if step not in skipped:
            search.tell(reward(samples) + level * step)
    return search


@pytest.mark.parametrize("kind", KINDS)
def test_shift_of_all_rewards_of_a_step_changes_nothing(kind):
    plain, moved = (advance(new(kind), range(5), level=level) for level in (0.0, -8.0))
    assert torch.equal(plain.mean, moved.mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", [(), (0,), (2,)])
def test_loaded_search_continues_exactly(kind, skipped):
    whole, resumed = advance(new(kind), range(7), skipped=skipped), advance(new(kind), range(50, 52))
    resumed.load_state_dict(advance(new(kind), range(3), skipped=skipped).state_dict())
    assert torch.equal(advance(resumed, range(3, 7), skipped=skipped).mean, whole.mean)


def test_cma_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    advance(new("cma"), range(3))
    assert np.array_equal(np.random.get_state()[1], before)


def test_cma_of_other_settings_is_not_resumed():
    saved = advance(new("cma"), range(2)).state_dict()
    with pytest.raises(ValueError, match="does not repeat itself"):
        CMASearch(START, 0.4, count=6, seed=1).load_state_dict(saved)
    with pytest.raises(ValueError, match="num_generations=6"):
        CMASearch(START, 0.3, count=7, seed=1).load_state_dict(saved)


def test_grid_of_other_points_is_not_resumed():
    saved = advance(new("grid"), range(2)).state_dict()
    for points in (torch.stack([START, TARGET, TARGET / 2, 2 * TARGET]), torch.stack([START, TARGET])):
        with pytest.raises(ValueError, match="grid is not this run's"):
            GridSearch(points).load_state_dict(saved)


def test_grid_goes_from_near_the_last_checkpoint_to_the_uniform_average():
    grid = power_profile_grid([1.0, 2.0, 3.0, 4.0], 8)
    torch.testing.assert_close(grid.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert (grid[:, -1].diff() < 0).all() and grid[0, -1] > 0.99
    torch.testing.assert_close(grid[-1], torch.full((4,), 0.25, dtype=torch.float64))
