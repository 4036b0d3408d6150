# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reward functions as trainers take them: checked, named and weighted."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from ..metrics.extractors import module_of
from ..metrics.image_metrics import ImageMetric
from ..rewards.subset_replace import SubsetReplaceReward


class RewardFunctions:
    """
    Several reward functions, in order.

    Args:
        functions (`Callable` or `list` of them): [`SubsetReplaceReward`] or functions of single images.
        weights (`list[float]`, *optional*): one each; all 1 by default.

    Raises:
        ValueError: there are not as many weights, or feature spaces of several rewards share names.

    Attributes:
        names (`list[str]`): the functions' own; of several that share one the second is `name_2`, and so on.
    """

    def __init__(self, functions: Any, weights: Sequence[float] | None = None):
        self.functions = list(functions) if isinstance(functions, list | tuple) else [functions]
        self.names = _distinct([getattr(f, "__name__", type(f).__name__) for f in self.functions])
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(self.weights)} entries for {len(self.functions)} reward functions: give one "
                "weight per function."
            )
        spaces = [space for reward in self.distributional for space in reward.extractors]
        if len(set(spaces)) < len(spaces):
            raise ValueError(
                f"feature spaces {spaces} of several rewards share names: give extractors as dictionaries."
            )

    @property
    def distributional(self) -> list[SubsetReplaceReward]:
        """Those of sets."""
        return [function for function in self.functions if isinstance(function, SubsetReplaceReward)]

    @property
    def need_images(self) -> bool:
        """Whether a function looks at images, where those of sets need no more than features."""
        return len(self.distributional) < len(self.functions)

    def to(self, device: torch.device) -> None:
        """Moves the networks behind all functions."""
        for function in self.functions:
            module = function if isinstance(function, SubsetReplaceReward) else module_of(function)
            if module is not None:
                module.to(device)

    def reset(self) -> None:
        """Forgets what the rewards of sets keep of an earlier run."""
        for reward in self.distributional:
            reward.reset()

    def metrics(self) -> dict[str, ImageMetric]:
        """The distances of the rewards of sets, as metrics of evaluation."""
        spaces = [item for reward in self.distributional for item in reward.metrics().items()]
        return {f"distance_{space}": metric for space, metric in spaces}


def _distinct(names: list[str]) -> list[str]:
    """The names, those that came before with the next number that is free."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        found.append(name if name not in found else next(n for n in numbered if n not in {*names, *found}))
    return found
