# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Advantages, selection and loss: Eq. 5 and 6 of arXiv 2607.02291 as pure functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGE_NORMALIZATIONS = ("batch", "group", "none")
SELECTIONS = ("all", "top", "top_bottom")


def normalize_advantages(rewards: Tensor, normalization: str = "batch", group_size: int = 1) -> Tensor:
    """
    Advantages `(R - mean) / std` (Eq. 5).

    Args:
        rewards (`torch.Tensor` of shape `(B, k)`): of all processes; k is 1 when a subset's images share a reward.
        normalization (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: over everything; `"group"`: within runs of `group_size` subsets that replaced the same slots;
            `"none"`: rewards about their mean, not divided: minus a distance is negative for the best as well.
        group_size (`int`, *optional*, defaults to 1): subsets of a group.

    Returns:
        `torch.Tensor` of shape `(B, k)`; zero where the rewards do not differ.
    """
    if normalization == "none":
        return rewards - rewards.mean()
    groups = rewards.reshape(1, -1) if normalization == "batch" else rewards.reshape(-1, group_size * rewards.shape[1])
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = groups.std(dim=1, keepdim=True)
    # Equal rewards leave rounding noise in their std: below it there is nothing to learn from.
    noise = 4 * torch.finfo(rewards.dtype).eps * groups.abs().amax(dim=1, keepdim=True)
    return torch.where(std > noise, centred / std.clamp(min=torch.finfo(rewards.dtype).tiny), 0.0).view_as(rewards)


def select(advantages: Tensor, selection: str, quantile: float, num_shares: int = 1) -> Tensor:
    """
    Mask of what is trained on (Section 4.3 of the paper).

    Args:
        advantages (`torch.Tensor` of shape `(B, k)`): of all processes.
        selection (`str`): `"all"`; `"top"`: the share `quantile` with the highest advantage; `"top_bottom"`: that
            share from either end.
        quantile (`float`): in (0, 1]; at least one is kept. Ties go to the earlier subset.
        num_shares (`int`, *optional*, defaults to 1):
            runs of subsets within which the share is taken: 1 is global, the number of processes is local.

    Returns:
        `torch.BoolTensor` of shape `(B, k)`.
    """
    if selection == "all":
        return torch.ones_like(advantages, dtype=torch.bool)
    shares = advantages.reshape(num_shares, -1)
    count = max(1, round(quantile * shares.shape[1]))
    order = shares.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, :count]
    if selection == "top_bottom":
        chosen = torch.cat([chosen, order[:, -count:]], dim=1)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(1, chosen, True).view_as(advantages)


@dataclass(frozen=True)
class PolicyLoss:
    """Per (image, step) pair `(P,)`: the loss to average, and what is logged of it."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon: float) -> PolicyLoss:
    """
    `-min(r A, clip(r, 1 - ε, 1 + ε) A)` with `r = exp(log_prob - old_log_prob)` (Eq. 6).

    Args:
        log_prob, old_log_prob, advantages (`torch.Tensor` of shape `(P,)`): per (image, step) pair.
        epsilon (`float`): clip range ε; 1e-4 in the paper, for log-probabilities averaged over dimensions.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    # clipped: the objective is flat here, so that this pair gives no gradient
    clipped = ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))
    return PolicyLoss(loss, ratio.detach(), clipped)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL between `N(mean, std²)` and `N(reference_mean, std²)`, mean over dimensions; `std` holds its sqrt(dt).

    Args:
        mean, reference_mean (`torch.Tensor` of shape `(P, ...)`), std (`torch.Tensor` of shape `(P,)`).

    Returns:
        `torch.Tensor` of shape `(P,)`.
    """
    return (mean - reference_mean).square().flatten(1).mean(1) / (2 * std**2)


def normalize_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """
    GRPO-Guard's ratio normalization (arXiv 2510.22319): log-ratios of all time steps on one scale, about 0.

    A step's log-ratio is `(Δμ·ε)/std - |Δμ|²/(2 std²)`, means over dimensions, with `Δμ = mean - old_mean`: it is
    biased below 0 and spreads as `1/std`. Returned is `std (log_ratio + |Δμ|²/(2 std²)) = Δμ·ε`.

    Args:
        log_ratio (`torch.Tensor` of shape `(P,)`), mean, old_mean (`torch.Tensor` of shape `(P, ...)`),
        std (`torch.Tensor` of shape `(P,)`).
    """
    return std * (log_ratio + gaussian_kl(mean, old_mean, std))
