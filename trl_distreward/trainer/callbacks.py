# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Callbacks: normalizing and averaging weights, progress, warnings of runs that learn nothing, and sample grids."""

import math
import re
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..conditions import Conditions
from ..files import written_whole
from ..generation import evaluating
from .image_sets import shared_images
from .network import asks_for_normalization
from .run_record import is_evaluation
from .sharding import reshard
from .watch import WatchHeldOut

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)


class UpdateWeights(TrainerCallback):
    """Normalizes weights after an optimizer step if the network's config says so, and updates their average."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        if asks_for_normalization(self.trainer.network):
            self.trainer.network.normalize_weights()  # type: ignore[operator]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.network, state.global_step)


class WatchLearning(TrainerCallback):
    """Warns, once each, of ten logged updates, or all of a shorter run, that learn nothing or that are all clipped."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.logs: list[dict[str, float]] = []
        self.warned: set[str] = set()
        self.weights = self._weights()

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        if "grad_norm" in logs and getattr(self.trainer, "search", None) is None:  # a search has no gradient
            self.logs.append(logs)
            self._judge(10)

    def on_train_end(self, *_: object, **__: object) -> None:
        self._judge(1)

    def _judge(self, least: int) -> None:
        if len(self.logs) < least:
            return
        logs, before, most = self.logs, self.weights, self.trainer.args.max_grad_norm
        self.logs, self.weights, norms = [], self._weights(), [log["grad_norm"] for log in logs]
        causes = {
            "the learning rate is 0: change learning_rate or its schedule": not any(x["learning_rate"] for x in logs),
            "they were skipped, for which warnings before say the reason": all("skipped_updates" in x for x in logs),
            "all gradients are 0: train what the images depend on": not any(norms),
            "changes are lost in rounding: raise learning_rate": before == self.weights,
        }
        found = [cause for cause, holds in causes.items() if holds]
        messages = [f"The last {len(logs)} updates changed nothing, as {cause}." for cause in found[:1]]
        if sum(norm > most > 0 for norm in norms) >= 9:
            reason = "the clip, not the rewards, decides how far an update goes"
            remedy = f"set it to about {2 * median(norms):.2g}, or to 0 for no clipping"
            messages.append(f"Nearly all gradients are longer than max_grad_norm={most:g}, so {reason}: {remedy}.")
        for message in messages:
            if message.split()[0] not in self.warned:
                self.warned.add(message.split()[0])
                logger.warning(message)

    def _weights(self) -> list[float]:
        """Lengths of this process's parts of the trained weights, none of them the same after an update."""
        reshard(self.trainer.network)
        parts = [getattr(p, "_local_tensor", p) for p in self.trainer.network.parameters() if p.requires_grad]
        return [torch.linalg.vector_norm(part.detach(), dtype=torch.float64).item() for part in parts]


# Ends of the names of an evaluation's times
_SPEEDS = ("_runtime", "_per_second", "epoch")
# Logged values that are shown to people; trackers get all
_SHOWN = re.compile(
    "loss|learning_rate|reference_distance/.+|reward(_std|_best)?|rewards/.+/mean|final_reward/.+|skipped_updates|"
    "num_images|train_runtime"
)


class ShowProgress(TrainerCallback):
    """Shows a line for each log and, unless `disable_tqdm` is set, a progress bar, on the main process."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        hidden = args.disable_tqdm or not state.is_world_process_zero
        steps = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(desc="Training", unit="update", dynamic_ncols=True, disable=hidden, **steps)
        self.logged = time.perf_counter(), state.global_step

    def on_step_end(self, *_: object, **__: object) -> None:
        self.bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: object, logs: dict[str, float], **__: object
    ) -> None:
        evaluation = is_evaluation(logs)
        names = [name for name in logs if _SHOWN.fullmatch(name) or (evaluation and not name.endswith(_SPEEDS))]
        shown = {name: f"{logs[name]:.4g}" if isinstance(logs[name], float) else str(logs[name]) for name in names}
        if "loss" in logs:
            (started, step), self.logged = self.logged, (time.perf_counter(), state.global_step)
            shown["seconds"] = f"{(self.logged[0] - started) / max(1, state.global_step - step):.3g}"
            beside = [name for name in shown if name in ("reward", "seconds") or name.startswith("reference_distance")]
            self.bar.set_postfix({name: shown[name] for name in beside})
        if state.is_world_process_zero:
            tqdm.write("  ".join([f"step {state.global_step}", *(f"{name} {value}" for name, value in shown.items())]))

    def on_train_end(self, *_: object, **__: object) -> None:
        self.bar.close()


def image_grid(images: Tensor) -> Image.Image:
    """Puts gray or RGB images `(N, C, H, W)`, uint8, in rows of about a square."""
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 64)
    padded = F.pad(torch.cat([images, blank]), [1] * 4, value=64)
    channels, height, width = padded.shape[1:]
    grid = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels).cpu()
    return Image.fromarray((grid[..., 0] if channels == 1 else grid).numpy())


class LogSamplesCallback(TrainerCallback):
    """
    Writes a grid of images before training, every few steps, and at the end. All grids start from the same noise, so
    they differ by the model alone. They show the weights that are evaluated, under the ODE if that is evaluated.

    Grids are saved as `samples/step-N.png` in the output folder, and sent to TensorBoard, Weights & Biases and Trackio
    if the run reports to them. Unless `log_samples=False`, a trainer has one with the defaults; one that you add takes
    its place.

    Args:
        trainer ([`DistributionRewardTrainer`] or [`MergeCoefficientTrainer`]): its policy is sampled.
        conditions: one per image; the first 64 of the reference set by default.
        freq (`int`, *optional*): steps between two grids; `eval_steps` or `save_steps` by default.
    """

    def __init__(self, trainer: "DiffusionTrainer", conditions: Conditions | None = None, freq: int | None = None):
        self.trainer, self.freq = trainer, freq
        self.schedule = min(trainer.args.eval_schedules.values(), key=lambda schedule: schedule.sampler != "ode")
        self.conditions = trainer.conditions[:64] if conditions is None else conditions

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        freq = self.freq or (state.eval_steps if args.eval_steps else state.save_steps)  # state has whole numbers
        if self.trainer.interrupted:  # the checkpoint comes first, and the resumed run begins with a grid
            return
        if state.global_step % freq == 0 or control.should_training_stop:
            self._log(args, state)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self._log(args, state)

    def _log(self, args: TrainingArguments, state: TrainerState) -> None:
        images = self._images()
        if images is None:
            logger.warning(f"There is no grid of samples at step {state.global_step}: an image is not finite.")
        if images is None or not state.is_world_process_zero:
            return
        grid, step = image_grid(images), state.global_step
        with written_whole(Path(args.output_dir) / "samples" / f"step-{step}.png") as file:
            grid.save(file, format="PNG")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")
        for name in ("wandb", "trackio"):
            if name in args.report_to:
                module = import_module(name)
                module.log({"samples": module.Image(grid), "train/global_step": step})

    @torch.no_grad()
    def _images(self) -> Tensor | None:
        """Images `(N, C, H, W)`; `None` if one is not finite."""
        trainer, record, gather = self.trainer, self.trainer.run_record, self.trainer.accelerator.gather
        record.images["samples"] += len(self.conditions)
        with evaluating(trainer.sampled_model) as model, record.timed("samples"), trainer.evaluation_weights():
            batches = shared_images(trainer, model, self.conditions, self.schedule, (0, "samples", 0), "Samples")
            parts = [(gather(images)[:valid], gather(finite).all()) for images, _, valid, finite in batches]
        return torch.cat([images for images, _ in parts]) if all(bool(finite) for _, finite in parts) else None


def add_default_callbacks(trainer: "DiffusionTrainer") -> None:
    """Shows progress in place of transformers' callbacks, watches, and writes grids unless `log_samples=False`."""
    for each in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(each)
    trainer.add_callback(ShowProgress())
    trainer.add_callback(WatchLearning(trainer))
    trainer.add_callback(WatchHeldOut(trainer))
    if trainer.args.log_samples:
        trainer.add_callback(LogSamplesCallback(trainer))
