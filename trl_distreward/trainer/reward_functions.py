# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reward functions of a trainer: named, weighted, and split into distribution rewards and rewards of single images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..metrics.extractors import module_of
from ..metrics.image_metrics import ImageMetric
from ..rewards.subset_replace import SubsetReplaceReward

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Reward:
    """
    One reward function: its name in the logs, its weight in the sum, whether it is a [`SubsetReplaceReward`]
    (`of_sets`), and its place among the functions of its kind (`index`).
    """

    name: str
    function: Any
    weight: float
    index: int
    of_sets: bool


class RewardFunctions:
    """
    The reward functions of a trainer.

    Attributes:
        all (`list[Reward]`): all functions, in order; a second function of the same name is called `name_2`.
        of_sets (`list[SubsetReplaceReward]`): the distribution rewards.
    """

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None):
        listed = list(functions) if isinstance(functions, list | tuple) else [functions]
        names = _distinct([getattr(f, "__name__", type(f).__name__) for f in listed])
        weights = list(weights) if weights is not None else [1.0] * len(listed)
        if len(weights) != len(listed):
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {len(listed)} reward functions: give one weight each."
            )
        self.all: list[Reward] = []
        for name, function, weight in zip(names, listed, weights, strict=True):
            of_sets = isinstance(function, SubsetReplaceReward)
            index = sum(reward.of_sets == of_sets for reward in self.all)
            self.all.append(Reward(name, function, weight, index, of_sets))
        self.of_sets: list[SubsetReplaceReward] = [reward.function for reward in self.all if reward.of_sets]
        spaces = [space for reward in self.of_sets for space in reward.extractors]
        if len(set(spaces)) < len(spaces):
            raise ValueError(
                f"feature spaces {spaces} of several rewards share names: pass extractors as dictionaries with "
                "different names."
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
        spaces = [item for reward in self.of_sets for item in reward.metrics().items()]
        return {f"distance_{space}": metric for space, metric in spaces}


def call_per_image(reward: Reward, **arguments: Any) -> Tensor:
    """Calls a function of single images: one float64 per image, `(K,)`."""
    images: Tensor = arguments["images"]
    returned = reward.function(**arguments)
    values = torch.as_tensor(returned, dtype=torch.float64, device=images.device).flatten()
    if len(values) != len(images):
        raise ValueError(
            f"reward function {reward.name!r} returned {len(values)} values for {len(images)} images: it must return "
            "one float per image."
        )
    return values


def _distinct(names: list[str]) -> list[str]:
    """Numbers repeated names: `score`, `score_2`, …"""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        found.append(name if name not in found else next(n for n in numbered if n not in {*names, *found}))
    return found
