# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Watching for reward hacking: the distance in features that no reward sees, beside the reward's own."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import State

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

EVALUATIONS = 3  # in a row, before a warning
PARTED = f"rose at {EVALUATIONS} evaluations in a row while the reward's distance fell, which is reward hacking"


def heldout_metrics(trainer: "DiffusionTrainer") -> list[str]:
    """Names of the evaluated distances that are not a reward's."""
    given = {name: metric for name, metric in trainer.eval_metrics.items() if name not in trainer.rewards.metrics()}
    return [name for name, metric in given.items() if getattr(metric, "higher_is_better", None) is False]


def parted(evaluations: Sequence[State], heldout: Sequence[str]) -> list[str]:
    """Held-out distances that part from the reward's own at the last evaluation, and had not before."""
    before = apart(evaluations[:-1], heldout)
    return [name for name in apart(evaluations, heldout) if name not in before]


def apart(evaluations: Sequence[State], heldout: Sequence[str]) -> list[str]:
    """Held-out distances that rose at each of the last evaluations while the reward's own, together, fell."""
    last = [each["values"] for each in evaluations[-EVALUATIONS - 1 :]]
    found = []
    for key in last[-1] if len(last) > EVALUATIONS else ():
        for name in heldout:
            prefix = key.removesuffix(name)
            own = [each for each in last[0] if each.startswith(f"{prefix}distance_") and each != key]
            relative = [sum(values[each] / last[0][each] for each in own) for values in last]
            rises = all(a[key] < b[key] for a, b in pairwise(last))
            if prefix != key and own and rises and all(a > b for a, b in pairwise(relative)):
                found.append(key)
    return found


class WatchHeldOut(TrainerCallback):
    """Warns where distances part, and keeps the best checkpoint, by default by the held-out distance."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer, self.heldout, args = trainer, heldout_metrics(trainer), trainer.args
        if self.heldout and args.metric_for_best_model is None:
            prefix, sampler = next(iter(trainer.eval_sets)), next(iter(args.eval_schedules))
            args.metric_for_best_model = f"eval_{prefix}{sampler}_{self.heldout[0]}"
            args.greater_is_better = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: State, **_: object
    ) -> None:
        for name in parted(self.trainer.run_record.evaluations, self.heldout):
            logger.warning(f"eval_{name} {PARTED}: stop here, or choose the checkpoint with its lowest value.")
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        sign = -1 if args.greater_is_better else 1
        best = math.inf if state.best_metric is None else sign * state.best_metric
        saves = self.trainer.is_in_train and state.global_step > 0 and args.save_strategy != "no"
        if saves and sign * metrics.get(name, math.inf) < best:
            control.should_save = True
            logger.info(f"{name} is the best so far, {metrics[name]:.4g}: this checkpoint is kept.")
