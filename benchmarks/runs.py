# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Training runs of small generators, of digits or MNIST, for benchmarks: one function, a table, a file of results."""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mnist
import numpy as np
import torch
from transformers import TrainerCallback

from trl_distreward import DiffusionDistributionConfig, DistributionRewardTrainer, SubsetReplaceReward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import METRICS, Digits, new_sit, prepare  # noqa: E402, F401

Prepare = Callable[[int], Digits]  # of a seed

IMAGES_PER_UPDATE = 256


class StopAtBudget(TrainerCallback):
    """
    Ends training before an update that would take more images, for rollouts and for reference sets. On the way it
    evaluates after each number of images in `evaluations`.
    """

    def __init__(self, budget: int, evaluations: Sequence[int] = ()):
        self.budget = budget
        self.marks = list(evaluations)
        self.evaluated: list[int] = []  # images at each evaluation
        self.trainer: Any = None

    @property
    def refreshes(self) -> int:
        return sum("seconds/refresh" in entry for entry in self.trainer.state.log_history)

    @property
    def images(self) -> int:
        steps = self.trainer.state.global_step
        return IMAGES_PER_UPDATE * steps + self.refreshes * self.trainer.args.reference_set_size

    def on_log(self, args, state, control, logs, **kwargs):
        if any(key.startswith("eval_") for key in logs):
            self.evaluated.append(self.images)
            return
        if self.marks and self.images >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > self.images]
            control.should_evaluate = True
        due = self.trainer.reference_set.is_due(state.global_step)
        if self.images + IMAGES_PER_UPDATE + due * args.reference_set_size > self.budget:
            control.should_training_stop = True


class FallingNoise(TrainerCallback):
    """Noise of rollouts whose level falls linearly from `first` to `last` over training."""

    def __init__(self, first: float, last: float):
        self.first, self.last = first, last

    def on_step_begin(self, args, state, control, **kwargs):
        done = state.global_step / max(1, state.max_steps - 1)
        level = self.first + (self.last - self.first) * done
        args.rollout_schedule = replace(args.rollout_schedule, noise_level=level)


def build_trainer(
    digits: Digits,
    folder: str,
    reward: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    others: Sequence[Callable[..., Any]] = (),
    eval_metrics: dict[str, Any] | None = None,
    **settings: Any,
) -> DistributionRewardTrainer:
    """
    A trainer of a prepared generator, at a constant rate; `reward` and `settings` override arguments, `others` are
    reward functions and `eval_metrics` metrics besides.
    """
    size = settings.get("replace_size", 1)
    defaults = {
        "output_dir": folder,
        "lr_scheduler_type": "constant",
        "learning_rate": 5e-5,
        "reference_set_size": 1000,
        "replace_size": size,
        "num_subsets": IMAGES_PER_UPDATE // size,
        "top_advantage_quantile": 1.0,
        "ema_decay": 0.9,
        "num_inference_steps": 10,
        "noise_level": 0.7,
        "last_step_size": None,
        "num_inference_steps_eval": 20,
        "num_eval_images": 2000,
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 500,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistributionRewardTrainer(
        model=str(digits.base_path),
        reward_funcs=[
            SubsetReplaceReward(digits.spaces, digits.real, **{"space_weights": {"asked": 1.5}, **(reward or {})}),
            *others,
        ],
        args=DiffusionDistributionConfig(**{**defaults, **settings}),
        eval_metrics=digits.eval_metrics() | (eval_metrics or {}),
        callbacks=callbacks,
    )


def run(
    prepared: Digits,
    seed: int,
    budget: int,
    reward: dict[str, Any] | None = None,
    others: Sequence[Callable[..., Any]] = (),
    eval_metrics: dict[str, Any] | None = None,
    evaluations: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
    save_to: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """
    Trains a generator on `budget` images and evaluates it.

    Args:
        prepared (`Digits`): the generator, what judges it, and the real images' statistics.
        seed (`int`): of the training.
        budget (`int`): images generated, reference sets counted.
        reward (`dict`, *optional*): further arguments of the reward.
        others (`Sequence[Callable]`, *optional*): further reward functions.
        eval_metrics (`dict`, *optional*): further metrics.
        evaluations (`Sequence[int]`, *optional*):
            evaluations after so many images, `"curve"` of the result. Those they generate are not counted.
        callbacks (`Sequence[TrainerCallback]`, *optional*): further callbacks.
        save_to (`Path`, *optional*): folder for the trained pipeline.
        settings: further fields of the configuration.

    Returns:
        `dict`: what the training took, what `"seconds"` each of its phases took (`"phases"`, by the clock), and the
        evaluation as `"{metric} {sampler}"`, or `"{metric} {sampler} {steps}"` where several numbers of steps are
        evaluated.
    """
    stop = StopAtBudget(budget, evaluations)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 10_000, **settings, "seed": seed}
        trainer = build_trainer(prepared, folder, reward, [stop, *callbacks], others, eval_metrics, **settings)
        stop.trainer = trainer
        forwards, started = [0], time.process_time()
        hook = trainer.network.register_forward_hook(lambda _, inputs, output: forwards.append(len(output[0])))
        if budget > 0:
            trainer.train()
        hook.remove()
        history = trainer.state.log_history
        result: dict[str, Any] = {
            "updates": trainer.state.global_step,
            "images": stop.images,
            "refreshes": stop.refreshes,
            "evaluations": sum(forwards),  # of the network, forward, one image each; those of evaluations too
            "seconds": time.process_time() - started,  # of the processor: other jobs on the machine do not count
            "phases": {
                key: sum(entry.get(key, 0.0) for entry in history)
                for key in sorted({key for entry in history for key in entry if key.startswith("seconds/")})
            },
        }
        columns = {metric: name for name, metric in METRICS.items()}

        def named(metrics: dict[str, float]) -> dict[str, float]:
            values = {}
            for schedule in trainer.args.eval_schedules:
                prefix = f"eval_{schedule}_"
                for key in (*columns, *(key for key in trainer.eval_metrics if key not in columns)):
                    if f"{prefix}{key}" in metrics:
                        values[f"{columns.get(key, key)} {schedule.replace('_', ' ')}"] = metrics[f"{prefix}{key}"]
            return values

        curve = [named(entry) for entry in history if "eval_runtime" in entry]
        if evaluations:
            result["curve"] = [
                {"images": images, **values} for images, values in zip(stop.evaluated, curve, strict=True)
            ]
        result |= named(trainer.evaluate())
        if save_to is not None:
            trainer.save_model(str(save_to))
    return result


def table(runs: dict[str, list[dict[str, float]]], columns: list[str]) -> str:
    """Mean ± standard deviation over seeds; whole numbers as they are."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, results in runs.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(set(values)) > 1 else ""
            digits = ".2g" if 0 < max(values) < 0.01 else ".2f"
            whole = all(float(value).is_integer() for value in values)
            cells.append(f"{np.mean(values):,.0f}" if whole else f"{np.mean(values):{digits}}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(
    parser: argparse.ArgumentParser,
    script: str,
    seeds: list[int],
    budget: int,
    data: Sequence[str] = ("digits", "mnist"),
) -> argparse.Namespace:
    """Adds the arguments that all benchmarks share; `args.prepare` makes a seed's generator of the data asked for."""
    parser.add_argument("--data", default="digits", choices=data, help="what is generated")
    parser.add_argument("--mnist", type=Path, default=Path("../shared/data"), help="where MNIST and its judges are")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="training seeds")
    parser.add_argument("--budget", type=int, default=budget, help="images of a run, reference sets counted")
    parser.add_argument("--cache", type=Path, default=Path("outputs/digits/cache"), help="where pretraining is kept")
    parser.add_argument("--output", type=Path, help="by default beside the script")
    args = parser.parse_args()
    if args.output is None:
        suffix = "" if args.data == "digits" else f"_{args.data}"
        args.output = Path(script).with_name(f"{Path(script).stem}{suffix}.json")
    if args.data == "mnist":
        args.prepare = cache(partial(mnist.prepare, args.cache, args.mnist))
    else:
        args.prepare = cache(lambda seed: prepare(args.cache, seed, 600))
    return args


def write(path: Path, args: argparse.Namespace, **results: Any) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings = {key: value for key, value in settings.items() if key not in ("cache", "output", "mnist", "prepare")}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    path.write_text(json.dumps({"settings": settings, "versions": versions, **results}, indent=2) + "\n")
