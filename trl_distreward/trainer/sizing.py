# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Messages before training: they are shown to users, and sizes that mislead are warned of."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainingArguments

from ..evaluation.image_metrics import FeatureDistance
from ..metrics.frechet import FrechetDistance

if TYPE_CHECKING:
    from .base import DiffusionTrainer
    from .distribution_reward_trainer import DistributionRewardTrainer

# The std of n normal rewards has a relative error of about 1 / sqrt(2 (n - 1)): 27 % for 8, 41 % for 4.
FEWEST_REWARDS = 8


def show_messages(args: TrainingArguments) -> None:
    """Shows this package's messages of `log_level`, by default INFO, on stderr unless the program set up logging."""
    package = logging.getLogger("trl_distreward")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO if args.log_level == "passive" else args.get_process_log_level())
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.propagate = False  # a later logging.basicConfig() would show them twice


def misleading_sets(trainer: "DiffusionTrainer") -> Iterator[str]:
    """Warnings of generated sets that are too small for their distance or leave classes out."""
    classes = trainer.policy.num_conditions
    sets = [("reference_set_size", trainer.conditions, trainer.rewards.metrics())]
    for prefix, conditions in trainer.eval_sets.items():
        name = f"num_eval_images of {prefix[:-1]}" if prefix else "num_eval_images"
        sets.append((name, conditions, trainer.eval_metrics))
    for name, conditions, metrics in sets:
        count = len(conditions)
        for key, metric in metrics.items():
            distance = metric.distance if isinstance(metric, FeatureDistance) else None
            if isinstance(distance, FrechetDistance) and count < distance.dimension:
                found = f"{name}={count} is less than the {distance.dimension} dimensions of {key}"
                yield f"{found}, so that the Fréchet distance is biased: raise it, or use distance='kernel'."
        if isinstance(conditions, Tensor) and classes is not None:
            missing = classes - len(torch.unique(conditions))
            if missing and name in ("reference_set_size", "num_eval_images"):
                yield f"{name}={count} has no image of {missing} of the model's {classes} classes."


def noisy_rewards(trainer: "DistributionRewardTrainer") -> Iterator[str]:
    """A warning if an update has so few rewards that their spread is noise."""
    args, per_image = trainer.args, any(not r.of_sets or r.function.credit != "shared" for r in trainer.rewards.all)
    name = "num_generations" if args.advantage_normalization == "group" else "num_subsets"
    count = getattr(args, name) * (args.replace_size if per_image else 1)
    if trainer.estimator.has_advantages and count < FEWEST_REWARDS:
        found = f"{name}={getattr(args, name)} gives {count} rewards, whose spread is mostly noise"
        yield f"{found}, and so is every advantage: raise it to {FEWEST_REWARDS} or more."
