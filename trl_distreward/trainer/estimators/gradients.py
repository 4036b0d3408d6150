# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Gradients of rewards with respect to features and images, for the estimators that use them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerState

from ...conditions import Conditions
from ...rewards.subset_replace import SubsetReplaceReward
from ..reward_functions import Reward, RewardFunctions
from ..rollouts import Rollout

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig

REMEDY = "use loss_type='nft' or 'grpo', which need no gradient"


def feature_gradients(rewards: RewardFunctions, rollout: Rollout, size: int) -> list[dict[str, Tensor]]:
    """
    Gradients `(M, d)` of the weighted distances by the features of all M new images, per distribution reward and
    space, for the set of `size` images in which all of them stand.
    """
    share = rollout.slots.numel() / size  # divided by, so that the scale does not depend on it
    found = []
    for reward in rewards.all:
        if reward.of_sets:
            rows = reward.function.gradient(rollout.slots.flatten(), rollout.gathered[reward.index])
            found.append({space: values * (reward.weight / share) for space, values in rows.items()})
    return found


def straight_through_uint8(images: Tensor) -> Tensor:
    """Rounds images in [0, 1] to whole numbers in [0, 255], float32; the gradient ignores the rounding."""
    scaled = images * 255
    return scaled + (scaled.round() - scaled).detach()


def check_all_stand(args: "DiffusionDistributionConfig") -> None:
    """Raises `ValueError` if not all new images of an update can stand in the reference set at once."""
    images, size = args.num_subsets * args.replace_size, args.reference_set_size
    if images >= size:
        raise ValueError(
            f"num_subsets * replace_size = {images}, which {args.loss_type!r} replaces at once, must be below "
            f"reference_set_size={size}: lower num_subsets."
        )
    if args.num_generations > 1:
        raise ValueError(
            f"num_generations={args.num_generations}: {args.loss_type!r} replaces every slot once. Set 1."
        )


def check_distance(reward: SubsetReplaceReward) -> None:
    """Raises `ValueError` if a distance has no gradient."""
    lacking = [space for space, distance in reward.distances.items() if not hasattr(distance, "gradient")]
    if lacking:
        raise ValueError(f"the distances of {', '.join(lacking)} have no gradient: {REMEDY}.")


def tracked(images: Tensor) -> Tensor:
    """Float images that record gradients, without 0 and 255, where rounding or clamping hides the gradient."""
    return (64 + images.float() / 2).requires_grad_()


def has_gradient(values: object, images: Tensor) -> bool:
    """Whether `values` are one row per image, with a gradient to the images."""
    if not isinstance(values, Tensor) or values.shape[:1] != images.shape[:1] or not values.requires_grad:
        return False
    # Uneven weights: the plain sum may be the same for all images, and squares have no gradient at 0.
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    (gradient,) = torch.autograd.grad(values, images, weights, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def call_with_gradient(
    rewards: RewardFunctions,
    reward: Reward,
    images: Tensor,
    conditions: Conditions,
    slots: Tensor,
    trainer_state: TrainerState,
) -> Tensor:
    """Calls a function of single images on float32 images in [0, 255]; what it logs has been logged with its score."""
    arguments = rewards.arguments(conditions, slots, trainer_state)
    for log in ("log_metric", "log_extra"):
        arguments[log] = lambda *args, **kwargs: None
    return reward.function(images=images, **arguments)
