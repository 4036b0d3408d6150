# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Updates that cannot be made because of values that are not finite."""

import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

SKIPPED_FOLDER = "skipped"


def write_context(trainer: "DiffusionTrainer", reason: str, context: dict[str, Any]) -> None:
    """
    Writes what a skipped update was made of.

    Raises:
        RuntimeError: more than `max_skipped_updates` in a row were skipped.
    """
    args, step, count = trainer.args, trainer.state.global_step, trainer.skipped_in_a_row
    path = os.path.join(args.output_dir, SKIPPED_FOLDER, f"step-{step}.pt")
    if trainer.accelerator.is_main_process:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save({"step": step, "reason": reason, "seed": args.seed, **context}, path)
    logger.warning(f"Update {step} is skipped: {reason}. Its context is in {path}.")
    if count > args.max_skipped_updates:
        raise RuntimeError(
            f"{count} updates in a row were skipped (max_skipped_updates={args.max_skipped_updates}), the last "
            f"because {reason}: lower the learning rate or noise_level, then {_where_to_start(trainer)}."
        )


def drop_bad_gradients(trainer: "DiffusionTrainer", model: nn.Module, norm: Any) -> None:
    """Drops gradients that are not finite before the optimizer sees them; the norm is the same on every process."""
    scaler = trainer.accelerator.scaler
    if norm is None or torch.isfinite(torch.as_tensor(norm)):
        trainer.skipped_in_a_row = 0
    elif trainer.is_deepspeed_enabled and not trainer.args.fp16:
        raise RuntimeError(
            "the gradient is not finite, and DeepSpeed has already taken the step: lower the learning rate or "
            f"noise_level, then {_where_to_start(trainer)}."
        )
    elif trainer.is_deepspeed_enabled or (scaler is not None and scaler.get_scale() >= 1):
        trainer.record("skipped_updates", 1.0)  # an overflow in float16: the scaler skips the step
    else:
        if scaler is None:
            model.zero_grad(set_to_none=True)
        trainer.skip_update("the gradient is not finite", grad_norm=float(norm))


def _where_to_start(trainer: "DiffusionTrainer") -> str:
    folder = trainer.args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    return f"resume from {last}" if last else "start again"
