# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import tiny_reward, tiny_trainer
from trl_distreward.trainer.advantages import normalize_advantages, select


def test_group_advantages_compare_only_within_groups():
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0], dtype=torch.float64)[:, None]
    half = 0.5**0.5
    expected = torch.tensor([-half, half, -half, half], dtype=torch.float64)[:, None]
    torch.testing.assert_close(normalize_advantages(rewards, "group", 2), expected)
    assert torch.equal(normalize_advantages(rewards, "none"), rewards - 7.0)  # the best must not look bad


@pytest.mark.parametrize("value", [0.0, -13.6, 0.1])
def test_equal_rewards_give_zero_advantages_and_not_noise(value):
    rewards = torch.full((7, 1), value, dtype=torch.float64)
    assert (normalize_advantages(rewards) == 0).all()


@pytest.mark.parametrize(
    ("selection", "quantile", "shares", "kept"),
    [
        ("top", 0.25, 1, [1]),
        ("top", 0.5, 1, [0, 1]),  # ties go to the earlier
        ("top", 0.01, 1, [1]),  # at least one
        ("top", 0.5, 2, [1, 3]),  # one of the two of each process
        ("top_bottom", 0.25, 1, [1, 2]),
        ("top_bottom", 1.0, 1, [0, 1, 2, 3]),
        ("all", 0.25, 1, [0, 1, 2, 3]),
    ],
)
def test_selection_keeps_the_asked_share(selection, quantile, shares, kept):
    advantages = torch.tensor([[0.3], [2.0], [-1.0], [0.3]], dtype=torch.float64)
    mask = select(advantages, selection, quantile, shares)
    assert mask.shape == (4, 1) and mask.flatten().nonzero().flatten().tolist() == kept


def bright(images, **kwargs):
    return images.double().mean((1, 2, 3)) * 100


def test_each_of_several_rewards_is_normalized_so_that_weights_compare_spreads(tmp_path):
    rewards = [torch.tensor([[1.0], [2.0], [4.0]]).double(), torch.tensor([[500.0], [100.0], [0.0]]).double()]
    settings = {"num_subsets": 3, "reward_weights": [1.0, 0.5]}
    advantages = tiny_trainer(tmp_path, reward_funcs=[tiny_reward(), bright], **settings).estimator.compute_advantages
    expected = sum(w * (r - r.mean()) / r.std() for w, r in zip([1.0, 0.5], rewards, strict=True))
    torch.testing.assert_close(advantages(rewards), expected)


def test_a_single_reward_is_normalized_whatever_its_weight(tmp_path):
    estimator = tiny_trainer(tmp_path, reward_weights=[0.1]).estimator
    assert estimator.compute_advantages([torch.randn(6, 1).double()]).std().item() == pytest.approx(1)


@pytest.mark.parametrize(("normalization", "size"), [("batch", 1), ("group", 4), ("none", 1)])
def test_abstentions_count_in_no_mean_and_get_no_advantage(normalization, size):
    rewards = torch.randn(12, 2, dtype=torch.float64)
    rewards[[0, 3, 4, 5], [0, 1, 1, 1]] = torch.nan
    rewards[8:] = torch.nan
    advantages = normalize_advantages(rewards, normalization, size)
    assert (advantages[rewards.isnan()] == 0).all()
    rows = 4 if normalization == "group" else 12
    for part, found in zip(rewards.split(rows), advantages.split(rows), strict=True):
        given = part[~part.isnan()]
        if not len(given):
            continue
        expected = (given - given.mean()) / (1 if normalization == "none" else given.std())
        torch.testing.assert_close(found[~part.isnan()], expected)
