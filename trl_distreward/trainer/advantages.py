# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Advantages and selection (Eq. 5 and Section 4.3 of arXiv 2607.02291)."""

import torch
from torch import Tensor

ADVANTAGE_NORMALIZATIONS = ("batch", "group", "none")
SELECTIONS = ("all", "top", "top_bottom")


def normalize_advantages(rewards: Tensor, normalization: str = "batch", group_size: int = 1) -> Tensor:
    """
    Computes advantages `(R - mean) / std` of rewards `(B, k)` of all processes (Eq. 5); zero if they do not differ.
    A NaN, where a reward function abstains, counts in neither and gets 0.

    `"batch"` takes mean and std over everything, `"group"` over runs of `group_size` subsets, which replace the same
    slots; `"none"` centres and does not divide. k is 1 if a subset's images share a reward.
    """
    given = ~rewards.isnan()
    if normalization == "none":
        return torch.where(given, rewards - rewards[given].mean(), 0.0)
    groups = rewards.reshape(1, -1) if normalization == "batch" else rewards.reshape(-1, group_size * rewards.shape[1])
    count = given.view_as(groups).sum(dim=1, keepdim=True)
    groups = torch.where(given.view_as(groups), groups, groups.nanmean(dim=1, keepdim=True))
    centred = groups - groups.mean(dim=1, keepdim=True)
    # those that stand at the mean add nothing to the sum of squares
    std = groups.std(dim=1, keepdim=True) * ((groups.shape[1] - 1) / (count - 1).clamp(min=1)).sqrt()
    # The std of equal rewards is rounding noise: below this bound there is nothing to learn.
    noise = 4 * torch.finfo(rewards.dtype).eps * groups.abs().amax(dim=1, keepdim=True)
    advantages = torch.where(std > noise, centred / std.clamp(min=torch.finfo(rewards.dtype).tiny), 0.0)
    return torch.where(given, advantages.view_as(rewards), 0.0)


def select(advantages: Tensor, selection: str, quantile: float, num_shares: int = 1) -> Tensor:
    """
    Selects what is trained on (Section 4.3): a mask of advantages `(B, k)` of all processes, from each of `num_shares`
    equal parts. At least one is kept; ties go to the earlier subset.
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
