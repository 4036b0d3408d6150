# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Advantages and selection (Eq. 5 and Section 4.3 of arXiv 2607.02291)."""

import torch
from torch import Tensor

ADVANTAGE_NORMALIZATIONS = ("batch", "group", "none")
SELECTIONS = ("all", "top", "top_bottom")


def normalize_advantages(rewards: Tensor, normalization: str = "batch", group_size: int = 1) -> Tensor:
    """
    Computes advantages `(R - mean) / std` of rewards `(B, k)` of all processes (Eq. 5); zero if they do not differ.

    `"batch"` takes mean and std over everything, `"group"` over runs of `group_size` subsets, which replace the same
    slots; `"none"` centres and does not divide. k is 1 if a subset's images share a reward.
    """
    if normalization == "none":
        return rewards - rewards.mean()
    groups = rewards.reshape(1, -1) if normalization == "batch" else rewards.reshape(-1, group_size * rewards.shape[1])
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = groups.std(dim=1, keepdim=True)
    # The std of equal rewards is rounding noise: below this bound there is nothing to learn.
    noise = 4 * torch.finfo(rewards.dtype).eps * groups.abs().amax(dim=1, keepdim=True)
    return torch.where(std > noise, centred / std.clamp(min=torch.finfo(rewards.dtype).tiny), 0.0).view_as(rewards)


def select(advantages: Tensor, selection: str, quantile: float, num_shares: int = 1) -> Tensor:
    """
    Selects what is trained on (Section 4.3): a mask of advantages `(B, k)` of all processes.

    `"top"` keeps the share `quantile` with the highest advantage, at least one, `"top_bottom"` that share at either
    end, `"all"` everything. Ties go to the earlier subset. `num_shares` equal parts are selected from one by one.
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
