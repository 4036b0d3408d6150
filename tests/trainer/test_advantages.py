# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_distreward.trainer.objective import (
    clipped_policy_loss,
    gaussian_kl,
    normalize_advantages,
    normalize_ratio,
    select,
)


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
    assert torch.equal(normalize_advantages(rewards, "none"), rewards - 7.0)  # the best must not look bad


@pytest.mark.parametrize("value", [0.0, -13.6, 0.1])
def test_equal_rewards_give_zero_advantages_and_not_noise(value):
    rewards = torch.full((7, 1), value, dtype=torch.float64)
    assert (normalize_advantages(rewards) == 0).all()


@pytest.mark.parametrize(
    ("selection", "quantile", "shares", "kept"),
    [
        ("top", 0.25, 1, [1]),
        ("top", 0.5, 1, [0, 1]),  # ties: the earlier
        ("top", 0.01, 1, [1]),  # at least one
        ("top", 0.5, 2, [1, 3]),  # of each process's two
        ("top_bottom", 0.25, 1, [1, 2]),
        ("top_bottom", 1.0, 1, [0, 1, 2, 3]),
        ("all", 0.25, 1, [0, 1, 2, 3]),
    ],
)
def test_selection(selection, quantile, shares, kept):
    advantages = torch.tensor([[0.3], [2.0], [-1.0], [0.3]], dtype=torch.float64)
    mask = select(advantages, selection, quantile, shares)
    assert mask.shape == (4, 1) and mask.flatten().nonzero().flatten().tolist() == kept


def test_normalized_log_ratio_is_centred_and_of_one_scale_for_all_noise():
    """Drawn under the old policy, the log-ratio's bias and its 1/std spread are gone; what is left is Δμ·ε."""
    generator = torch.Generator().manual_seed(0)
    delta = 0.3 * torch.randn(1, 8, generator=generator, dtype=torch.float64).expand(50_000, 8)
    noise = torch.randn(50_000, 8, generator=generator, dtype=torch.float64)
    spreads = []
    for value in (0.05, 0.5):
        std, old_mean = torch.full((50_000,), value, dtype=torch.float64), torch.zeros_like(noise)
        sample, mean = old_mean + value * noise, old_mean + delta
        log_ratio = (-((sample - mean) ** 2) + (sample - old_mean) ** 2).mean(1) / (2 * value**2)
        assert log_ratio.mean() < -0.05
        normalized = normalize_ratio(log_ratio, mean, old_mean, std)
        torch.testing.assert_close(normalized, (delta * noise).mean(1))
        assert abs(normalized.mean()) < 5 * normalized.std() / 50_000**0.5
        spreads.append(normalized.std().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-9)


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
