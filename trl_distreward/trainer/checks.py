# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Checks at construction, so that a misfit shows before any work is done."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..conditions import Conditions, take
from ..generation import image_generators
from ..metrics.image_scores import score_images
from ..policies import DiffusionPolicy, to_uint8
from .network import asks_for_normalization

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)


@torch.no_grad()
def images_of_noise(
    policy: DiffusionPolicy, conditions: Conditions, device: torch.device
) -> tuple[Tensor, Conditions]:
    """Decodes pure noise to two uint8 images `(2, C, H, W)`; returns them with their conditions."""
    tried = take(conditions, [0, 1])
    noise = policy.noise(tried, image_generators(0, "check", 0, [0, 1]))
    return to_uint8(policy.decode(noise.to(device))), tried


@torch.no_grad()
def check_rewards_and_metrics(trainer: "DiffusionTrainer") -> None:
    """Runs every reward function and metric once, and looks for the metric of the best model among them."""
    images, conditions = images_of_noise(trainer.policy, trainer.conditions, trainer.accelerator.device)
    for reward in trainer.rewards.of_sets:
        reward.extract(images, conditions)
    slots = torch.arange(2, device=images.device)
    arguments = trainer.rewards.arguments(conditions, slots, trainer.state)
    tried = score_images(trainer.rewards.single, images, **arguments)
    for name, scores in zip(trainer.rewards.single, tried, strict=True):
        if scores.isinf().any():
            raise ValueError(f"reward function {name!r} returned NaN or infinity for a test image: return a number.")
    size = "x".join(map(str, images.shape[-2:]))
    for name, metric in trainer.eval_metrics.items():
        metric.reset()
        metric.update(images, conditions)
        metric.reset()
        real = getattr(getattr(metric, "distance", None), "image_size", None)
        if real not in (None, size):  # no error: extractors resize both
            remedy = "pass real_resize, or compute statistics with --resize"
            logger.warning(f"{name} compares images of {size} pixels with real ones of {real}, so blur too: {remedy}.")
    args, best = trainer.args, trainer.args.metric_for_best_model
    if best is None:
        return
    samplers = [f"{prefix}{sampler}" for prefix in trainer.eval_sets for sampler in args.eval_schedules]
    known = {f"eval_{s}_{name}": metric for s in samplers for name, metric in trainer.eval_metrics.items()}
    if best not in known and f"eval_{best}" not in known:
        raise ValueError(f"metric_for_best_model={best!r} is not evaluated: choose one of {', '.join(known)}.")
    higher = getattr(known.get(best, known.get(f"eval_{best}")), "higher_is_better", args.greater_is_better)
    if higher != args.greater_is_better:
        raise ValueError(f"greater_is_better={not higher} would keep the worst model by {best}: set it to {higher}.")


def check_launch(trainer: "DiffusionTrainer") -> None:
    """Raises `ValueError` for a way of launching that would fail late, or train something else than asked for."""
    if not any(p.requires_grad for p in trainer.network.parameters()):
        raise ValueError("no parameter requires a gradient: call requires_grad_() on some, or pass peft_config.")
    args, split = trainer.args, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}: set it to 2, as in accelerate_configs/fsdp2.yaml.")
    if plugin is not None and plugin.mixed_precision_policy is not None:
        # FSDP would round the times too: in bfloat16 0.98 and 0.984 are the same.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)
    changed = args.averages_weights or asks_for_normalization(trainer.network)
    if trainer.is_deepspeed_enabled and changed:
        reason = "DeepSpeed lets only the optimizer change weights: no average, old policy or normalization"
        remedy = "set ema_decay=0 and a loss_type without an old policy, or launch with accelerate_configs/fsdp2.yaml"
        raise ValueError(f"{reason}. Either {remedy}.")
    if split and any(schedule.num_evaluations is None for schedule in args.eval_schedules.values()):
        raise ValueError("eval_solver='dopri5' steps differently on each process, which FSDP cannot: use 'heun'.")
    if args.n_gpu > 1:
        raise ValueError(f"one process sees {args.n_gpu} GPUs: start as many with torchrun, or show it only one.")
    if trainer.accelerator.device.type == "mps":
        raise ValueError("distances need float64, which MPS devices do not have: set use_cpu=True.")
