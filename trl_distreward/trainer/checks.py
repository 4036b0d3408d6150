# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What trainers try before any training, so that what does not fit together shows at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditions import take
from ..generation import image_generators
from ..metrics.distance import supports
from ..metrics.image_metrics import ImageMetric
from ..policies import DiffusionPolicy, to_uint8
from ..rewards.subset_replace import SubsetReplaceReward
from .reward_functions import RewardFunctions

# What to do about a reward that has no gradient
_REMEDY = (
    "use a policy gradient, which needs no gradient of the reward: recipe='policy_gradient', or loss_type='grpo' and "
    "sampler='sde'"
)


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
        ValueError: `metric_for_best_model` is not evaluated, or says itself that the other way is up.
    """
    name = args.metric_for_best_model
    if name is None:
        return
    known = {f"eval_{sampler}_{key}": metric for sampler in args.eval_schedules for key, metric in metrics.items()}
    metric = known.get(name, known.get(f"eval_{name}"))
    if metric is None:
        raise ValueError(f"metric_for_best_model={name!r} is not evaluated: choose one of {', '.join(known)}.")
    higher = getattr(metric, "higher_is_better", None)
    if higher is not None and higher != args.greater_is_better:
        raise ValueError(
            f"greater_is_better={args.greater_is_better} would keep the worst by metric_for_best_model={name!r}: set "
            f"greater_is_better={higher}."
        )


def check_sizes(args: Any, rewards: RewardFunctions, processes: int) -> None:
    """
    Args:
        args ([`DiffusionDistributionConfig`]): configuration.
        rewards ([`RewardFunctions`]): what judges images.
        processes (`int`): that share out the subsets.

    Raises:
        ValueError: subsets cannot be shared out, or the best of several candidates has no distance to be chosen by.
    """
    if args.best_of_n > 1 and not rewards.distributional:
        raise ValueError(
            f"best_of_n={args.best_of_n} chooses by the replaced distance, but no reward is a SubsetReplaceReward: "
            "set best_of_n=1."
        )
    if args.num_subsets % processes:
        raise ValueError(
            f"num_subsets={args.num_subsets} is not divisible among {processes} processes: choose a multiple of "
            f"{processes}."
        )


def check_gradients(images: Tensor, conditions: Any, rewards: RewardFunctions, trainer_state: Any) -> None:
    """
    Back-propagates every reward to `images`, uint8 `(2, C, H, W)`.

    Raises:
        ValueError: one has no gradient, or none that reaches the images.
    """
    tracked = 64 + images.float() / 2  # a rounded or clamped image would tell nothing at its ends
    tracked.requires_grad_()
    for name, function in zip(rewards.names, rewards.functions, strict=True):
        with torch.enable_grad():
            if isinstance(function, SubsetReplaceReward):
                _check_distance_gradients(tracked, conditions, function)
            else:
                _check_score_gradient(tracked, conditions, name, function, trainer_state)


def _is_blind(values: Tensor, tracked: Tensor) -> bool:
    """Whether values do not change with the images that they are of."""
    if not values.requires_grad:
        return True
    # their sum or that of their squares may be the same for all images, and squares have no gradient at 0
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    (gradient,) = torch.autograd.grad(values, tracked, weights, allow_unused=True)
    return gradient is None or not bool((gradient != 0).any())


def _check_score_gradient(tracked: Tensor, conditions: Any, name: str, function: Any, trainer_state: Any) -> None:
    if not getattr(function, "differentiable", False):
        raise ValueError(
            f"reward function {name!r} does not say that it is differentiable: if it returns a tensor with gradients "
            f"to float32 images in [0, 255], set its attribute differentiable=True; else {_REMEDY}."
        )
    slots = torch.arange(2, device=tracked.device)
    scores = function(images=tracked, conditions=conditions, slots=slots, trainer_state=trainer_state)
    if not isinstance(scores, Tensor) or scores.shape != (2,) or _is_blind(scores, tracked):
        raise ValueError(
            f"reward function {name!r} returned {scores!r} for 2 images: it must return a tensor of shape (2,) with a "
            f"gradient to them; else {_REMEDY}."
        )


def _check_distance_gradients(tracked: Tensor, conditions: Any, reward: SubsetReplaceReward) -> None:
    if reward.credit != "shared" or reward.control_variate:
        raise ValueError(
            "loss_type='backprop' takes the gradient of the distance itself: leave credit='shared' and "
            "control_variate=False."
        )
    lacking = [space for space, distance in reward.distances.items() if not supports(distance, "gradient")]
    if lacking:
        raise ValueError(f"the distances of {lacking} have no gradient: {_REMEDY}.")
    for space, values in reward.extract(tracked, conditions, gradient=True).items():
        if _is_blind(values, tracked):
            raise ValueError(f"feature extractor {space!r} passes no gradient to its images: {_REMEDY}.")
