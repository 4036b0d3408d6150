# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Checks at construction, so that a misfit shows before any work is done."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..conditions import take
from ..generation import image_generators
from ..metrics.image_metrics import ImageMetric
from ..policies import DiffusionPolicy, to_uint8
from .base_config import DiffusionTrainerConfig
from .network import asks_for_normalization
from .reward_functions import RewardFunctions

if TYPE_CHECKING:
    from .base import DiffusionTrainer


@torch.no_grad()
def images_of_noise(policy: DiffusionPolicy, conditions: Any, device: torch.device) -> tuple[Tensor, Any]:
    """Decodes pure noise to two uint8 images `(2, C, H, W)`, to try rewards and metrics on; and their conditions."""
    tried = take(conditions, [0, 1])
    noise = policy.noise(tried, image_generators(0, "check", 0, [0, 1]))
    return to_uint8(policy.decode(noise.to(device))), tried


@torch.no_grad()
def check_on(images: Tensor, conditions: Any, rewards: RewardFunctions, metrics: Mapping[str, ImageMetric]) -> None:
    """Runs every feature extractor and metric once."""
    for reward in rewards.of_sets:
        reward.extract(images, conditions)
    for name, metric in metrics.items():
        metric.reset()
        try:
            metric.update(images, conditions)
        except Exception as error:
            error.add_note(f"raised by eval metric {name!r} on two test images {tuple(images.shape)}.")
            raise
        metric.reset()


def check_best_metric(args: DiffusionTrainerConfig, metrics: Mapping[str, ImageMetric]) -> None:
    """
    Raises:
        ValueError: `metric_for_best_model` is not evaluated, or `greater_is_better` contradicts the metric.
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
            f"greater_is_better={args.greater_is_better} would keep the model with the worst {name}: set "
            f"greater_is_better={higher}."
        )


def check_launch(trainer: "DiffusionTrainer", ema_decay: float) -> None:
    """
    Raises:
        ValueError: a way of launching that would fail late, or train something else than asked for.
    """
    args, accelerator = trainer.args, trainer.accelerator
    plugin = accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: set fsdp_version: 2, as in examples/accelerate_configs/fsdp2.yaml."
        )
    if plugin is not None and plugin.mixed_precision_policy is not None:
        # FSDP would round the times too: in bfloat16 0.98 and 0.984 are the same.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)
    if trainer.is_deepspeed_enabled and (ema_decay > 0 or asks_for_normalization(trainer.network)):
        raise ValueError(
            f"ema_decay={ema_decay} and forced_weight_normalization change weights outside of the optimizer, which "
            "DeepSpeed does not allow: set ema_decay=0, or launch with examples/accelerate_configs/fsdp2.yaml."
        )
    adaptive = [name for name, schedule in args.eval_schedules.items() if schedule.num_evaluations is None]
    if adaptive and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            f"evaluation under {adaptive[0]!r} with 'dopri5' takes another number of forward passes on every process, "
            "which FSDP and ZeRO must make together: set eval_solver='heun'."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process per GPU, e.g. torchrun --nproc_per_node "
            f"{args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one."
        )
    if accelerator.device.type == "mps":
        raise ValueError("distances need float64, which MPS devices do not have: set use_cpu=True.")
