# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reward functions as trainers take them: checked, named and weighted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..generation import image_generators, take
from ..metrics.report import ImageMetric, module_of
from ..policies import DiffusionPolicy, to_uint8
from ..rewards.subset_replace import SubsetReplaceReward


class RewardFunctions:
    """
    Several reward functions, in order.

    Args:
        functions (`Callable` or `list` of them): [`SubsetReplaceReward`] or functions of single images.
        weights (`list[float]`, *optional*): one each; all 1 by default.

    Raises:
        ValueError: there are not as many weights, or feature spaces of several rewards share names.
    """

    def __init__(self, functions: Any, weights: Sequence[float] | None = None):
        self.functions = list(functions) if isinstance(functions, list | tuple) else [functions]
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
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

    def metrics(self) -> dict[str, ImageMetric]:
        """The distances of the rewards of sets, as metrics of evaluation."""
        spaces = [item for reward in self.distributional for item in reward.metrics().items()]
        return {f"distance_{space}": metric for space, metric in spaces}


@torch.no_grad()
def images_of_noise(policy: DiffusionPolicy, conditions: Any, device: torch.device) -> tuple[Tensor, Any]:
    """Two images of nothing but noise and their conditions, to try things on."""
    tried = take(conditions, [0, 1])
    noise = policy.noise(tried, image_generators(0, "check", 0, [0, 1]))
    # the network may not be on the device yet, unlike what decodes and judges
    return to_uint8(policy.decode(noise.to(device))), tried


@torch.no_grad()
def check_on(images: Tensor, conditions: Any, rewards: RewardFunctions, metrics: Mapping[str, ImageMetric]) -> None:
    """Runs every extractor and metric once, so that a misfit shows before any training."""
    for reward in rewards.distributional:
        reward.extract(images, conditions)
    for name, metric in metrics.items():
        metric.reset()
        try:
            metric.update(images, conditions)
        except Exception as error:
            error.add_note(f"raised by eval metric {name!r} on two test images {tuple(images.shape)}.")
            raise
        metric.reset()


def check_best_metric(args: Any, metrics: Mapping[str, ImageMetric]) -> None:
    """
    Raises:
        ValueError: `metric_for_best_model` is not evaluated.
    """
    name = args.metric_for_best_model
    known = [f"eval_{sampler}_{metric}" for sampler in args.eval_schedules for metric in metrics]
    if name is not None and name not in known and f"eval_{name}" not in known:
        raise ValueError(f"metric_for_best_model={name!r} is not evaluated: choose one of {', '.join(known)}.")
