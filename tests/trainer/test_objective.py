# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_distreward.trainer.objective import clipped_policy_loss, gaussian_kl, normalize_advantages, select_top


def test_batch_advantages_are_standardized_over_everything():
    rewards = torch.randn(12, 3, dtype=torch.float64) * 0.02 - 13.6  # a spread of 0.1 % as in the paper
    advantages = normalize_advantages(rewards)
    assert advantages.shape == (12, 3)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-9)
    assert advantages.std().item() == pytest.approx(1, rel=1e-9)


def test_group_advantages_compare_only_within_groups():
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0], dtype=torch.float64)[:, None]
    half = 0.5**0.5
    expected = torch.tensor([-half, half, -half, half], dtype=torch.float64)[:, None]
    torch.testing.assert_close(normalize_advantages(rewards, "group", 2), expected)
    assert torch.equal(normalize_advantages(rewards, "none"), rewards)


@pytest.mark.parametrize("value", [0.0, -13.6, 0.1])
def test_equal_rewards_give_zero_advantages_and_not_noise(value):
    rewards = torch.full((7, 1), value, dtype=torch.float64)
    assert (normalize_advantages(rewards) == 0).all()


def test_selection_keeps_the_global_top_share():
    advantages = torch.tensor([[0.3], [2.0], [-1.0], [0.3]], dtype=torch.float64)
    assert select_top(advantages, 0.25).flatten().tolist() == [False, True, False, False]
    assert select_top(advantages, 0.5).flatten().tolist() == [True, True, False, False]  # ties: the earlier
    assert select_top(advantages, 1.0).all()
    assert select_top(advantages, 0.01).sum() == 1


def test_on_policy_gradient_is_the_policy_gradient():
    log_prob = torch.randn(6, requires_grad=True)
    advantages = torch.randn(6)
    result = clipped_policy_loss(log_prob, log_prob.detach(), advantages, epsilon=1e-4)
    result.loss.sum().backward()
    assert (result.ratio == 1).all() and not result.clipped.any()
    torch.testing.assert_close(log_prob.grad, -advantages)


def test_clipping_stops_the_gradient_only_beyond_the_range_in_the_direction_of_gain():
    delta = torch.tensor([2e-4, 2e-4, -2e-4, -2e-4, 5e-5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    result = clipped_policy_loss(delta, torch.zeros(5), advantages, epsilon=1e-4)
    result.loss.sum().backward()
    assert result.clipped.tolist() == [True, False, False, True, False]
    assert (delta.grad == 0).tolist() == [True, False, False, True, False]


def test_kl_is_that_of_two_gaussians():
    mean, reference, std = torch.randn(4, 10), torch.randn(4, 10), torch.rand(4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std[:, None]), normal(reference, std[:, None])).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)
