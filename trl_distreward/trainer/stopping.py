# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Stopping a run by a signal: with a checkpoint of the last whole update, on all processes together."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..files import State

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = 2.0  # seconds in which a launcher may pass on a signal that its processes have got already


class Interrupted(Exception):
    """Leaves an update, a reference set or an evaluation halfway."""


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after SIGTERM or SIGINT. A second signal leaves at once."""

    def __init__(self) -> None:
        self.requested = self.stopped = False  # this process was asked to stop; the last run was stopped
        self.saved = -1  # step of the last checkpoint
        self.state_before: State | None = None  # of the trainer, before an update that has begun
        self._asked = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> None:
        self.stopped, self.saved, self.state_before = False, -1, None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous, self.requested = {}, False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._asked = True, time.monotonic()
            name = signal.Signals(number).name
            logger.warning(f"{name}: training stops after the batch at hand, with a checkpoint; again: at once.")
        elif time.monotonic() - self._asked > PASSED_ON:
            self.__exit__()
            signal.raise_signal(number)

    def asked(self, args: TrainingArguments) -> bool:
        """Whether any process was asked to stop. All processes call it."""
        if args.world_size == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return flag.item() > 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        if Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").is_dir():  # resumed from
            self.saved = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.asked(args):
            self.stopped = True
            control.should_save = self.saved != state.global_step
            control.should_evaluate = False  # an evaluation may take hours
            control.should_training_stop = True

    on_epoch_end = on_step_end  # Trainer may ask for an evaluation at the end of an epoch

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self.saved = state.global_step


def stop_if_asked(trainer: "DiffusionTrainer") -> None:
    """Leaves what is being done if a signal asked any process to. All processes call it."""
    if trainer.stop.asked(trainer.args):
        raise Interrupted


@contextmanager
def droppable(trainer: "DiffusionTrainer") -> Iterator[None]:
    """Keeps the state before an update. It is saved if the update is left halfway, as if that had not begun."""
    trainer.stop.state_before = trainer.training_state()
    yield
    trainer.stop.state_before = None


def leave(trainer: "DiffusionTrainer", started: float) -> TrainOutput:
    """Ends a run that was left halfway, with a checkpoint of its last whole update."""
    trainer.stop.stopped = True
    trainer._metrics.clear()  # of the dropped update
    if trainer.state.global_step not in (0, trainer.stop.saved):
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return trainer._finalize_training(None, 0, started)
