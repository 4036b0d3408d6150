# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Training runs of small generators, of digits, MNIST or CIFAR-10, on a given number of generated images."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cifar
import mnist
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback

from trl_distreward import DiffusionDistributionConfig, DistributionRewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import METRICS, Digits, prepare  # noqa: E402

IMAGES_PER_UPDATE = 256
DATA: dict[str, Callable[[Path, Path, int], Digits]] = {
    "digits": lambda cache, _, seed: prepare(cache, seed, 600),
    "mnist": mnist.prepare,
    "cifar": cifar.prepare,
}
PHASES = ("refresh", "rollout", "reward", "training")


class StopAtBudget(TrainerCallback):
    """Ends training before an update that would exceed `budget` images, and evaluates at `evaluations` images."""

    def __init__(self, budget: int, evaluations: Sequence[int] = ()):
        self.budget = budget
        self.marks = list(evaluations)
        self.evaluated: list[int] = []  # images at each evaluation
        self.trainer: Any = None

    def on_log(self, args, state, control, logs, **kwargs):
        images = self.trainer.num_images
        if any(key.startswith("eval_") for key in logs):
            self.evaluated.append(images)
            return
        if self.marks and images >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > images]
            control.should_evaluate = True
        due = self.trainer.reference_set.is_due(state.global_step)
        if images + IMAGES_PER_UPDATE + due * args.reference_set_size > self.budget:
            control.should_training_stop = True


class FallingNoise(TrainerCallback):
    """Lets the noise level of rollouts fall linearly from `first` to `last` over training."""

    def __init__(self, first: float, last: float):
        self.first, self.last = first, last

    def on_step_begin(self, args, state, control, **kwargs):
        done = state.global_step / max(1, state.max_steps - 1)
        level = self.first + (self.last - self.first) * done
        args.rollout_schedule = replace(args.rollout_schedule, noise_level=level)


class Held:
    """Bytes held now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def held_for_backward(weights: bool = True) -> Iterator[Held]:
    """Counts what autograd holds for the backward pass in the context, without parameters if `weights` is false."""
    held = Held()

    class Kept:
        def __init__(self, tensor: Tensor):
            counts = weights or not isinstance(tensor, nn.Parameter)
            self.tensor, self.size = tensor, tensor.nbytes if counts else 0
            held.add(self.size)

        def __del__(self) -> None:
            held.add(-self.size)

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield held


def build_trainer(
    digits: Digits,
    folder: str,
    *,
    reward: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    others: Sequence[Callable[..., Any]] = (),
    eval_metrics: dict[str, Any] | None = None,
    **settings: Any,
) -> DistributionRewardTrainer:
    """Builds a trainer; `reward` and `settings` are arguments of the reward and fields of the configuration."""
    colour = isinstance(digits, cifar.Colour)
    batch_size = 32 if colour else 256  # what a processor's cache holds
    defaults = {
        "output_dir": folder,
        "reference_set_size": 1000,
        "num_subsets": IMAGES_PER_UPDATE // settings.get("replace_size", 1),
        "num_inference_steps": 10,
        "noise_level": 0.7,
        "last_step_size": 0,
        "num_inference_steps_eval": [20],
        "eval_samplers": ["sde", "ode"],
        "num_eval_images": 2000,
        "rollout_batch_size": batch_size,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_samples": False,
    }
    trainer = DistributionRewardTrainer(
        model=str(digits.base_path),
        reward_funcs=[digits.reward(**(reward or {})), *others],
        args=DiffusionDistributionConfig(**{**defaults, **settings}),
        eval_metrics=digits.eval_metrics() | (eval_metrics or {}),
        callbacks=callbacks,
    )
    if colour:
        trainer.network.to(memory_format=torch.channels_last)  # its convolutions take 0.7 times as long
    return trainer


def run(
    prepared: Digits,
    seed: int,
    budget: int,
    *,
    evaluations: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
    save_to: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Trains a generator on `budget` images, reference sets included, and evaluates it; `options` are those of
    [`build_trainer`].

    Returns:
        `dict`: `"images"`, network `"evaluations"` of one image each, processor `"seconds"` and clock seconds by phase
        (`"phases"`) that training took; metrics as `"{metric} {sampler}"`, or `"{metric} {sampler} {steps}"` if
        several numbers of steps are evaluated; and their `"curve"`, if `evaluations` names numbers of images.
    """
    stop = StopAtBudget(budget, evaluations)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 10_000, **options, "callbacks": [stop, *callbacks], "seed": seed}
        trainer = build_trainer(prepared, folder, **options)
        stop.trainer = trainer
        forwards, started = [0], time.process_time()
        hook = trainer.network.register_forward_hook(lambda _, inputs, output: forwards.append(len(output[0])))
        if budget > 0:
            trainer.train()
        hook.remove()
        result: dict[str, Any] = {
            "images": trainer.num_images,
            "evaluations": sum(forwards),
            "seconds": time.process_time() - started,
            "phases": {phase: trainer.run_record.seconds[phase] for phase in PHASES if budget > 0},
        }
        curve = [_named(trainer, entry) for entry in trainer.state.log_history if "eval_runtime" in entry]
        if evaluations:
            result["curve"] = [{"images": n, **values} for n, values in zip(stop.evaluated, curve, strict=True)]
        result |= _named(trainer, trainer.evaluate())
        if save_to is not None:
            trainer.save_model(str(save_to))
    return result


def _named(trainer: DistributionRewardTrainer, metrics: dict[str, float]) -> dict[str, float]:
    names = {metric: name for name, metric in METRICS.items()}
    return {
        f"{names.get(metric, metric)} {schedule.replace('_', ' ')}": metrics[f"eval_{schedule}_{metric}"]
        for schedule in trainer.args.eval_schedules
        for metric in trainer.eval_metrics
        if f"eval_{schedule}_{metric}" in metrics
    }


def parse_args(parser: argparse.ArgumentParser, data: Sequence[str] = tuple(DATA)) -> argparse.Namespace:
    """Parses arguments that training benchmarks share. `args.prepare` makes the generator of a seed."""
    parser.add_argument("--data", default="digits", choices=data, help="images to generate")
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="folder of images and judges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 20, 30, 40], help="training seeds")
    parser.add_argument("--cache", type=Path, default=Path("outputs/digits/cache"), help="pretrained networks")
    args = parser.parse_args()
    args.prepare = cache(partial(DATA[args.data], args.cache, args.folder))
    return args
