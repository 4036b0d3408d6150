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


def test_several_rewards_are_summed_before_or_after_normalization(tmp_path):
    rewards = [torch.tensor([[1.0], [2.0], [4.0]]).double(), torch.tensor([[500.0], [100.0], [0.0]]).double()]
    found = {}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        settings = {"num_subsets": 3, "reward_weights": [1.0, 0.5], "multi_objective_aggregation": aggregation}
        trainer = tiny_trainer(tmp_path, reward_funcs=[tiny_reward(), lambda images, **_: images.sum()], **settings)
        found[aggregation] = trainer.estimator.compute_advantages(rewards)
    assert found["sum_then_normalize"].argmax() == 0  # the large reward drowns the other
    expected = sum(w * (r - r.mean()) / r.std() for w, r in zip([1.0, 0.5], rewards, strict=True))
    torch.testing.assert_close(found["normalize_then_sum"], expected)
    assert found["normalize_then_sum"].argmax() == 2
