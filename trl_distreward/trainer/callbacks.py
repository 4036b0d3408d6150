# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What happens beside the updates: averaging, stopping on request, and what a person watches."""

import math
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..conditions import take
from ..files import written_whole
from ..generation import generate_images
from .sharding import is_split

logger = get_logger(__name__)


def asks_for_normalization(network: Any) -> bool:
    """Whether the network's config has `forced_weight_normalization=True`."""
    return bool(getattr(getattr(network, "config", None), "forced_weight_normalization", False))


class NormalizeWeights(TrainerCallback):
    """Gives weights back their size after every step of the optimizer, of networks that ask for it in their config."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if asks_for_normalization(self.trainer.network):
            self.trainer.network.normalize_weights()


class UpdateEMA(TrainerCallback):
    """Moves the average of the weights after every update."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.network, state.global_step)


class StopOnSIGTERM(TrainerCallback):
    """
    Ends the run cleanly after the current update, with a checkpoint: what a cluster's scheduler asks for.

    Attributes:
        stopped (`bool`): whether it has ended the last run.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = False
        self._previous: Any = None
        self._saved = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped, self._saved = False, -1
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: Any) -> None:
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the signal may reach processes at different steps: they stop together once any has it
        flag = torch.tensor(float(self.requested), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() > 0:
            if not self.stopped:
                logger.warning(f"SIGTERM: training stops after step {state.global_step} with a checkpoint.")
            self.stopped = True
            control.should_save = self._saved != state.global_step
            control.should_evaluate = False  # which may take hours
            control.should_training_stop = True

    on_epoch_end = on_step_end  # after what else a step has led to

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step

    def restore(self) -> None:
        """Gives the signal back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous, self.requested = None, False


def image_grid(images: Tensor, columns: int | None = None, padding: int = 1) -> Image.Image:
    """
    One picture of many.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`, uint8): gray or RGB.
        columns (`int`, *optional*): images in a row; about a square by default.
        padding (`int`, *optional*, defaults to 1): gray pixels around each.
    """
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 64)
    padded = F.pad(torch.cat([images, blank]), [padding] * 4, value=64)
    channels, height, width = padded.shape[1:]
    grid = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels).cpu()
    return Image.fromarray((grid[..., 0] if channels == 1 else grid).numpy())


class LogSamplesCallback(TrainerCallback):
    """
    Writes a grid of images from the same noise before training, every few steps, and at the end, so that what changes
    is the model.

    Grids are saved as `samples/step-N.png` in the output folder, and sent to TensorBoard, Weights & Biases and Trackio
    where the run reports to them. The weights are those that are evaluated: the average where there is one.

    Args:
        trainer ([`DistributionRewardTrainer`]): whose policy is sampled.
        conditions: one per image; by default the first 64 of the reference set.
        freq (`int`, *optional*): steps between two grids; `eval_steps` or `save_steps` by default.
        sampler (`str`, *optional*, defaults to `"ode"`):
            one of the evaluated samplers, or one of the evaluated schedules by its name, e.g. `"sde_250"`.
        seed (`int`, *optional*, defaults to 0): seed of the noise.

    Example:

    ```python
    trainer.add_callback(LogSamplesCallback(trainer, freq=10))
    ```
    """

    def __init__(
        self, trainer: Any, conditions: Any = None, freq: int | None = None, sampler: str = "ode", seed: int = 0
    ):
        schedules = trainer.args.eval_schedules
        found = [schedule for name, schedule in schedules.items() if sampler in (name, schedule.sampler)]
        if not found:
            raise ValueError(
                f"sampler={sampler!r} is not evaluated: choose one of {', '.join(schedules)}, or add it to "
                "eval_samplers."
            )
        self.trainer = trainer
        self.conditions = trainer.conditions[:64] if conditions is None else conditions
        self.freq = freq
        self.schedule = found[0]
        self.seed = seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        freq = self.freq or (state.eval_steps if args.eval_steps else state.save_steps)  # no share of the steps there
        if self.trainer.interrupted:  # the checkpoint comes first, and the resumed run begins with a grid
            return
        if state.global_step % freq == 0 or control.should_training_stop:
            self._log(args, state)

    def _log(self, args: Any, state: Any) -> None:
        trainer, count = self.trainer, len(self.conditions)
        split = is_split(trainer.sampled_network)  # then a forward pass takes all processes, and they make all images
        processes = 1 if split else args.world_size
        indices = range(args.process_index % processes, count, processes)
        autocast = trainer.autocast() if split else nullcontext()
        trainer.run_record.images["samples"] += count
        with trainer.run_record.timed("samples"), trainer.evaluation_weights(), autocast:
            batches = generate_images(
                trainer.policy,
                take(self.conditions, indices),
                self.schedule,
                seed=self.seed,
                batch_size=args.per_device_eval_batch_size,
                model=trainer.sampled_network,
                stream="samples",
                indices=indices,
                decode_batch_size=args.decode_batch_size,
            )
            images, error = {}, ""
            try:
                # clones: a view would be sent with all of its batch
                made = (image.clone() for batch, _ in batches for image in batch.cpu())
                images = dict(zip(indices, made, strict=True))
            except ValueError as found:  # on all processes, where all make all
                error = str(found)
            parts = [(images, error)] if processes == 1 else gather_object([(images, error)])
        if not state.is_world_process_zero:
            return
        errors = [error for _, error in parts if error]
        if errors:
            logger.warning(f"There is no grid of samples at step {state.global_step}: {errors[0]}")
            return
        everything = {index: image for share, _ in parts for index, image in share.items()}
        grid, step = image_grid(torch.stack([everything[i] for i in range(count)])), state.global_step
        path = Path(args.output_dir) / "samples" / f"step-{step}.png"
        with written_whole(path) as file:
            grid.save(file, format="PNG", pnginfo=self._description(count))
        self._report(args, grid, step)

    def _description(self, count: int) -> PngInfo:
        """What the report says below a grid."""
        about = PngInfo()
        steps = f", {self.schedule.num_steps} steps" if self.schedule.num_evaluations is not None else ""
        text = f"{count} images, {self.schedule.sampler.upper()}{steps}, noise of seed {self.seed}"
        about.add_text("Description", text)
        return about

    def _report(self, args: Any, grid: Image.Image, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if isinstance(callback, TensorBoardCallback) and writer is not None:
                pixels = torch.tensor(list(grid.convert("RGB").tobytes()), dtype=torch.uint8)
                writer.add_image("samples", pixels.view(grid.height, grid.width, 3), step, dataformats="HWC")
        for name in ("wandb", "trackio"):
            if name in args.report_to:
                module = __import__(name)
                module.log({"samples": module.Image(grid)})


def print_rewards(rewards: Tensor, advantages: Tensor, step: int, most: int = 10) -> None:
    """
    A table of the best and worst subsets, with as many digits as their differences need.

    Args:
        rewards, advantages (`torch.Tensor` of shape `(B,)`): of all subsets.
        step (`int`): said in the title.
        most (`int`, *optional*, defaults to 10): rows.
    """
    spread = rewards.std().item()
    digits = max(2, 2 - math.floor(math.log10(spread))) if spread > 0 else 6
    order = rewards.argsort(descending=True).tolist()
    shown = order if len(order) <= most else order[: most // 2] + order[-(most - most // 2) :]
    table = Table(title=f"Step {step}")
    for name in ("rank", "subset", "reward", "advantage"):
        table.add_column(name, justify="right")
    for place, subset in enumerate(shown):
        if place == most // 2 and len(shown) < len(order):
            table.add_section()
        rank = order.index(subset) + 1
        table.add_row(str(rank), str(subset), f"{rewards[subset]:.{digits}f}", f"{advantages[subset]:+.2f}")
    console = Console()
    console.print(table)
    console.print(f"{len(order)} subsets: {rewards.mean():.{digits}f} ± {spread:.{digits}f}")
