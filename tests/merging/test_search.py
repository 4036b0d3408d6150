# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from trl_distreward.merging.posthoc import LARGEST_SIGMA_REL
from trl_distreward.merging.search import CMASearch, GridSearch, RandomSearch, power_profile_grid

START = torch.zeros(1, 4, dtype=torch.float64)
TARGET = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)
KINDS = ["grid", "random", "cma"]


def new(kind):
    if kind == "grid":
        return GridSearch(torch.stack([START, TARGET / 2, TARGET, 2 * TARGET]))
    return RandomSearch(START, 0.3) if kind == "random" else CMASearch(START, 0.3, count=6, seed=1)


def reward(samples):
    return -((samples - TARGET) ** 2).sum((1, 2))


def advance(search, steps, first=0, level=0.0):
    for step in range(first, first + steps):
        samples = search.ask(6, torch.Generator().manual_seed(step))
        search.tell(samples, reward(samples) + level * step)
    return search


@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_what_is_better(kind):
    search = advance(new(kind), 40)
    bound = {"grid": 0.0, "random": 0.3, "cma": 1e-3}[kind]
    assert reward(search.mean[None]).item() >= bound * reward(START[None]).item()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_compared_within_a_step_only(kind):
    """What moves all rewards of a step changes nothing."""
    plain, moved = (advance(new(kind), 5, level=level) for level in (0.0, -8.0))
    assert torch.equal(plain.mean, moved.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_search_goes_on_as_the_one_that_was_saved(kind):
    whole, half = advance(new(kind), 7), advance(new(kind), 3)
    resumed = advance(new(kind), 2, first=50)  # whatever it was before
    resumed.load_state_dict(half.state_dict())
    assert torch.equal(advance(resumed, 4, first=3).mean, whole.mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", [0, 2])
def test_step_that_was_asked_and_never_told_does_not_hinder_loading(kind, skipped):
    def run(search, steps):
        for step in steps:
            samples = search.ask(6, torch.Generator().manual_seed(step))
            if step != skipped:
                search.tell(samples, reward(samples))
        return search

    whole, resumed = run(new(kind), range(6)), new(kind)
    resumed.load_state_dict(run(new(kind), range(skipped + 1)).state_dict())
    assert torch.equal(run(resumed, range(skipped + 1, 6)).mean, whole.mean)


def test_unused_cma_search_is_loaded_as_such():
    resumed = advance(new("cma"), 2)
    resumed.load_state_dict(new("cma").state_dict())
    assert torch.equal(resumed.mean, START)


def test_cma_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    advance(new("cma"), 3)
    assert (np.random.get_state()[1] == before).all()


def test_cma_of_other_settings_is_not_resumed():
    saved = advance(new("cma"), 2).state_dict()
    with pytest.raises(ValueError, match="does not repeat itself"):
        CMASearch(START, 0.4, count=6, seed=1).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"num_generations \(6, now 7\)"):
        CMASearch(START, 0.3, count=7, seed=1).load_state_dict(saved)


def test_grid_of_other_points_is_not_resumed():
    saved = advance(new("grid"), 2).state_dict()
    for points in (torch.stack([START, TARGET, TARGET / 2, 2 * TARGET]), torch.stack([START, TARGET])):
        with pytest.raises(ValueError, match=f"the grid is not that of the checkpoint, 4 points, now {len(points)}"):
            GridSearch(points).load_state_dict(saved)


def test_grid_goes_from_near_the_last_checkpoint_to_the_uniform_average():
    grid = power_profile_grid([1.0, 2.0, 3.0, 4.0], 8)
    torch.testing.assert_close(grid.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert (grid[:, -1].diff() < 0).all() and grid[0, -1] > 0.99
    torch.testing.assert_close(grid[-1], torch.full((4,), 0.25, dtype=torch.float64))


def test_grid_of_stored_averages_contains_them():
    """A width that a stored average has is that average alone; two widths at each time are no obstacle."""
    stds = [LARGEST_SIGMA_REL / 4, LARGEST_SIGMA_REL / 2] * 2
    grid = power_profile_grid([1.0, 1.0, 2.0, 2.0], 8, stds)
    torch.testing.assert_close(grid.sum(dim=1), torch.ones(8, dtype=torch.float64))
    alone = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(grid[1], alone[2], atol=1e-9, rtol=0)
    torch.testing.assert_close(grid[3], alone[3], atol=1e-9, rtol=0)
