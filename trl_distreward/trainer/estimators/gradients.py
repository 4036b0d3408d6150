# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Gradients of rewards with respect to features and images, for the estimators that use them."""

from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...conditions import Conditions, take
from ..reward_functions import Reward
from ..rollouts import Rollout, Sampler

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig
    from ..distribution_reward_trainer import DistributionRewardTrainer

OTHERS = "use loss_type='nft' or 'grpo'"
REMEDY = f"{OTHERS}, which need no gradient"
SAME = 0.1  # a larger share of a value, from float32 in place of uint8 images, is more than rounding


Gradients = dict[int, dict[str, Tensor]]  # by the index of a distribution reward and by feature space


def feature_gradients(rewards: Iterable[Reward], rollout: Rollout, size: int) -> Gradients:
    """Gradients `(M, d)` of the weighted distances by all new features, which all stand in the set of `size`."""
    share = rollout.slots.numel() / size  # divided by, so that the scale does not depend on it
    found = {}
    for reward in rewards:
        if reward.of_sets:
            rows = reward.function.gradient(rollout.slots.flatten(), rollout.gathered[reward.index])
            found[reward.index] = {space: values * (reward.weight / share) for space, values in rows.items()}
    return found


def own_rows(sampler: Sampler, rollout: Rollout, found: Gradients) -> Gradients:
    """The rows of this process's images among `(M, d)` of all new images."""
    mine = sampler.image_indices(len(rollout.local_slots))
    rows = slice(mine.start, mine.stop)
    return {index: {space: values[rows] for space, values in spaces.items()} for index, spaces in found.items()}


def straight_through_uint8(images: Tensor) -> Tensor:
    """Rounds images in [0, 1] to whole numbers in [0, 255], float32; the gradient ignores the rounding."""
    scaled = images * 255
    return scaled + (scaled.round() - scaled).detach()


def check_all_stand(args: "DiffusionDistributionConfig") -> None:
    """Raises `ValueError` if not all new images of an update can stand in the reference set at once."""
    images, size = args.num_subsets * args.replace_size, args.reference_set_size
    if images >= size:
        asked = f"num_subsets * replace_size = {images}, which {args.loss_type!r} replaces at once"
        raise ValueError(f"{asked}, must be below reference_set_size={size}: lower num_subsets, or {OTHERS}.")
    if args.num_generations > 1:
        raise ValueError(
            f"num_generations={args.num_generations}: {args.loss_type!r} replaces a slot once. Set 1, or {OTHERS}."
        )


def values_of(
    trainer: "DistributionRewardTrainer",
    reward: Reward,
    images: Tensor,
    conditions: Conditions,
    slots: Tensor,
    check_finite: bool = False,
) -> dict[str, Tensor]:
    """Values of float32 images, with gradients, by name: features by space, or the scores of a function."""
    if reward.of_sets:
        return reward.function.extract(images, conditions, check_finite=check_finite, gradient=True)
    arguments = trainer.rewards.arguments(conditions, slots, trainer.state)
    for log in ("log_metric", "log_extra"):
        arguments[log] = lambda *args, **kwargs: None
    return {reward.name: reward.function(images=images, **arguments)}


def reward_terms(
    trainer: "DistributionRewardTrainer",
    reward: Reward,
    images: Tensor,
    rollout: Rollout,
    rows: slice,
    gradients: Gradients,
) -> list[Tensor]:
    """Terms of minus a reward by the images of `rows`: features times their `gradients`, or a function's scores."""
    conditions = take(rollout.conditions, range(rows.start, rows.stop))
    values = values_of(trainer, reward, images, conditions, rollout.local_slots[rows])
    if reward.of_sets:
        wanted = gradients[reward.index]
        return [(features * wanted[space][rows].to(features.dtype)).sum() for space, features in values.items()]
    return [-reward.weight * _sum(scores, images) / rollout.slots.numel() for scores in values.values()]


def _sum(scores: Tensor | list[Tensor | None], images: Tensor) -> Tensor:
    """The sum of the scores of the images for which a function does not abstain."""
    if isinstance(scores, Tensor):
        return scores.sum()
    return sum((score.sum() for score in scores if score is not None), start=0 * images.sum())


def without_gradient(
    trainer: "DistributionRewardTrainer", reward: Reward, images: Tensor, conditions: Conditions
) -> dict[str, object]:
    """
    Values of a reward, by name, that are not one row with a gradient for each of two uint8 images.

    Raises `ValueError` if a distance has no gradient, or float32 images get other values than uint8 ones.
    """
    # without 0 and 255, where rounding or clamping hides the gradient
    x = (64 + images.float() / 2).round().requires_grad_()
    slots = torch.arange(len(x), device=x.device)
    distances = reward.function.distances.items() if reward.of_sets else ()
    bare = [space for space, distance in distances if not hasattr(distance, "gradient")]
    if bare:
        raise ValueError(f"the distances of {', '.join(bare)} have no gradient: {REMEDY}.")
    with torch.enable_grad():
        tried = values_of(trainer, reward, x, conditions, slots, check_finite=True)
        lacking: dict[str, object] = {name: values for name, values in tried.items() if not has_gradient(values, x)}
    if not lacking:
        with torch.no_grad():
            usual = values_of(trainer, reward, x.detach().to(torch.uint8), conditions, slots)
        for name, values in tried.items():
            if (values - usual[name]).abs().max() > SAME * usual[name].abs().max():
                found = f"{name!r} has other values for float32 images in [0, 255] than for the same in uint8"
                raise ValueError(f"{found}: it must not depend on the dtype.")
    return lacking


def has_gradient(values: object, images: Tensor) -> bool:
    """Whether `values` are one row per image, with a gradient to the images."""
    if isinstance(values, Coroutine):
        values.close()  # is never awaited
    if not isinstance(values, Tensor) or values.shape[:1] != images.shape[:1] or not values.requires_grad:
        return False
    # Uneven weights: the plain sum may be the same for all images, and squares have no gradient at 0.
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    (gradient,) = torch.autograd.grad(values, images, weights, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())
