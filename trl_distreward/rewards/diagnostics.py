# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""How much of a subset's reward is its images: Appendix C of arXiv 2607.02291, from the images of one update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..metrics.distance import supports
from .subset_replace import SubsetReplaceReward


def reward_diagnostics(
    reward: SubsetReplaceReward,
    slots: Tensor,
    features: Mapping[str, Tensor],
    conditions: Any,
    generator: torch.Generator | None = None,
    num_placements: int = 32,
) -> dict[str, float]:
    """
    Spread of subset rewards (Eq. 4, whatever the credit) and where it comes from.

    Args:
        reward ([`SubsetReplaceReward`]): with a reference set.
        slots (`torch.LongTensor` of shape `(B, n)`): places of the subsets, B ≥ 2.
        features (`dict` of `torch.Tensor` of shape `(B * n, d)`): of the new images, subset by subset.
        conditions: one per slot of the reference set; images are only placed where their own condition is.
        generator (`torch.Generator`, *optional*): draws placements.
        num_placements (`int`, *optional*, defaults to 32): placements of one subset's images.

    Returns:
        `dict[str, float]`:
        - `cv_percent/n_{k}`: coefficient of variation over subsets of their first k images, k = 1, 2, 4, … and n.
        - `placement_share`: variance of one subset's reward over other places for the same images, as a share of the
          variance over subsets. It is noise: nothing about the images differs.
        - `signal_to_noise`: the remaining variance over the placements' variance.
        - `removed_share`: share of the variance that the control variate takes out, where the distance can tell.
        - `drift`: mean reward minus the unchanged set's, in standard deviations over subsets. Of a policy that has
          not changed since it made the reference set (a placebo) it is 0 on average, with deviation about
          `√(1/B + n/(2N))`: of the subsets, and of the set they all replace parts of.
    """
    count, size = slots.shape
    if count < 2:
        raise ValueError(f"slots of shape {tuple(slots.shape)}: a spread needs at least 2 subsets.")
    parts = {name: values.view(count, size, -1) for name, values in features.items()}
    found: dict[str, float] = {}
    for k in sorted({size, *(2**i for i in range(size.bit_length()) if 2**i <= size)}):
        rewards = reward.subset_rewards(slots[:, :k], {name: v[:, :k].flatten(0, 1) for name, v in parts.items()})
        found[f"cv_percent/n_{k}"] = 100 * (rewards.std() / rewards.mean().abs()).item()
    variance = rewards.var().item()
    baseline = -sum(reward.weighted_distances.values())
    found["drift"] = (rewards.mean().item() - baseline) / max(variance, 1e-300) ** 0.5
    placed = []
    for b in torch.linspace(0, count - 1, min(count, 4)).round().long().tolist():
        places = _placements(slots[b].tolist(), conditions, num_placements, generator).to(slots.device)
        again = {name: v[b].expand(num_placements, size, -1).flatten(0, 1) for name, v in parts.items()}
        placed.append(reward.subset_rewards(places, again).var().item())
    noise = sum(placed) / len(placed)
    if variance > 0:
        found["placement_share"] = noise / variance
    if noise > 0:
        found["signal_to_noise"] = max(variance - noise, 0.0) / noise
    if variance > 0 and all(supports(distance, "delete_one") for distance in reward.distances.values()):
        effects = reward.removal_effects[slots.to(reward.removal_effects.device)].sum(dim=1)
        found["removed_share"] = 1 - (rewards + effects.to(rewards.device)).var().item() / variance
    return found


def _placements(slots: list[int], conditions: Any, count: int, generator: torch.Generator | None) -> Tensor:
    """`(count, n)`: for each of `slots` another at random with the same condition, distinct in a row."""
    keys = conditions.tolist() if isinstance(conditions, Tensor) else list(conditions)
    alike: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    asked: dict[Any, list[int]] = {}
    for column, slot in enumerate(slots):
        asked.setdefault(keys[slot], []).append(column)
    places = torch.empty(count, len(slots), dtype=torch.long)
    for key, columns in asked.items():
        candidates = torch.tensor(alike[key])
        for row in range(count):
            order = torch.randperm(len(candidates), generator=generator)[: len(columns)]
            places[row, columns] = candidates[order]
    return places
