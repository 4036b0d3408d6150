# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reward functions of a trainer: named, weighted, and split into distribution rewards and rewards of single images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from ..conditions import Conditions
from ..evaluation.image_metrics import ImageMetric
from ..metrics.extractors import module_of
from ..rewards.subset_replace import SubsetReplaceReward

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Reward:
    """One reward function."""

    name: str  # in the logs
    function: Any
    weight: float
    index: int  # among the functions of its kind
    of_sets: bool  # whether it is a `SubsetReplaceReward`


class RewardFunctions:
    """All reward functions of a trainer, in order (`all`), and the distribution rewards among them (`of_sets`)."""

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None):
        listed = list(functions) if isinstance(functions, list | tuple) else [functions]
        weights = list(weights) if weights is not None else [1.0] * len(listed)
        if len(weights) != len(listed):
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {len(listed)} reward functions: give one weight each."
            )
        self.all: list[Reward] = []
        names = [getattr(function, "__name__", type(function).__name__) for function in listed]
        for i, (function, weight) in enumerate(zip(listed, weights, strict=True)):
            earlier, of_sets = names[:i].count(names[i]), isinstance(function, SubsetReplaceReward)
            name = f"{names[i]}_{earlier + 1}" if earlier else names[i]  # score, score_2, …
            index = sum(reward.of_sets == of_sets for reward in self.all)
            self.all.append(Reward(name, function, weight, index, of_sets))
        self.of_sets: list[SubsetReplaceReward] = [reward.function for reward in self.all if reward.of_sets]
        spaces = [space for reward in self.of_sets for space in reward.extractors]
        if len(set(spaces)) < len(spaces):
            raise ValueError(
                f"feature spaces {spaces} share names: pass each reward's extractors as a dictionary of other names."
            )

    @property
    def need_images(self) -> bool:
        """Whether a function looks at images; distribution rewards need only their features."""
        return len(self.of_sets) < len(self.all)

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """Weighted sum over functions."""
        parts = [reward.weight * value for reward, value in zip(self.all, values, strict=True)]
        return sum(parts[1:], start=parts[0])

    def to(self, device: torch.device) -> None:
        """Moves the networks behind all functions."""
        for reward in self.all:
            module = reward.function if reward.of_sets else module_of(reward.function)
            if module is not None:
                module.to(device)

    def reset(self) -> None:
        """Forgets the reference sets of an earlier run."""
        for reward in self.of_sets:
            reward.reset()

    def metrics(self) -> dict[str, ImageMetric]:
        """The distances of the distribution rewards, as metrics for evaluation."""
        return {f"distance_{space}": metric for reward in self.of_sets for space, metric in reward.metrics().items()}


def call_per_image(
    reward: Reward, images: Tensor, conditions: Conditions, slots: Tensor, trainer_state: TrainerState
) -> Tensor:
    """Calls a function of single images `(K, C, H, W)`: one float64 per image, `(K,)`."""
    returned = reward.function(images=images, conditions=conditions, slots=slots, trainer_state=trainer_state)
    values = torch.as_tensor(returned, dtype=torch.float64, device=images.device).flatten()
    if len(values) != len(images):
        raise ValueError(
            f"reward function {reward.name!r} returned {len(values)} values for {len(images)} images: return one "
            "float per image."
        )
    return values


def joined(
    join: Callable[[list[Tensor]], Tensor], parts: Sequence[list[dict[str, Tensor]]]
) -> list[dict[str, Tensor]]:
    """Joins features `(K, d)` that several parts have per distribution reward and feature space."""
    rewards = zip(*parts, strict=True)
    return [{space: join([part[space] for part in group]) for space in group[0]} for group in rewards]
