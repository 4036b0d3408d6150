# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The cost of a run before it starts: network evaluations by arithmetic; seconds and memory by one real update."""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil
import torch
from peft import PeftModel
from torch import nn

from .image_sets import ImageBatch

if TYPE_CHECKING:
    from .distribution_reward_trainer import DistributionRewardTrainer

GIB = 2**30
FLOAT = 4  # bytes of float32
# Bytes of the optimizer's state per trained parameter; AdamW's two moments for optimizers that are not listed
OPTIMIZER_BYTES = {"sgd": 0, "adagrad": 4, "rmsprop": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 1}
HEADROOM = 0.95  # share of the free disk to plan with


@dataclass(frozen=True)
class Plan:
    """Numbers of events in a run, and network evaluations of all processes for each; guidance counts twice."""

    steps: int
    refreshes: int
    evaluations: int
    checkpoints: int
    counts: dict[str, int]  # per rollout, update, refresh and evaluation

    @classmethod
    def of(cls, trainer: "DistributionRewardTrainer") -> "Plan":
        args, policy, per_epoch = trainer.args, trainer.policy, trainer.steps_per_epoch
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        interval = 10 if args.reference_refresh_steps == "auto" else int(args.reference_refresh_steps)
        interval = math.ceil(interval / args.num_iterations) * args.num_iterations
        factor = 2 if getattr(policy, "guided", getattr(policy, "guidance_scale", 1.0) != 1.0) else 1
        sampled = factor * args.rollout_schedule.num_steps
        evaluated = sum(factor * (s.num_evaluations or s.num_steps) for s in args.eval_schedules.values())
        counts = {
            "rollout": args.num_subsets * args.replace_size * args.best_of_n * sampled,
            "update": factor * trainer.estimator.num_passes(),
            "refresh": args.reference_set_size * sampled if trainer.rewards.of_sets else 0,
            "evaluation": trainer.num_eval_images * evaluated,
        }

        def times(strategy: str, every: float | None) -> int:
            if strategy == "no" or not every:
                return 0
            every = every * steps if every < 1 else every  # transformers takes a share of all steps as well
            return int(steps // (per_epoch if strategy == "epoch" else every))

        refreshes = 1 if args.reference_update == "rolling" else math.ceil(steps / interval)
        evaluations = times(args.eval_strategy, args.eval_steps) + bool(args.eval_on_start)
        return cls(steps, refreshes, evaluations, times(args.save_strategy, args.save_steps), counts)

    def describe(self, trainer: "DistributionRewardTrainer") -> str:
        """The sizes of a run, by arithmetic."""
        args, of_sets, classes = trainer.args, trainer.rewards.of_sets, trainer.policy.num_conditions or 1
        often = [math.ceil(self.steps / args.num_iterations), self.steps, self.refreshes, self.evaluations]
        passes = [count * times for count, times in zip(self.counts.values(), often, strict=True)]
        new, size = args.num_subsets * args.replace_size * args.best_of_n, args.reference_set_size
        width = sum(getattr(each, "dimension", 0) for reward in of_sets for each in reward.distances.values())
        parameters = [(p.numel(), p.requires_grad) for p in trainer.skeleton.parameters()]
        chosen = f", the best of {args.best_of_n} each" if args.best_of_n > 1 else ""
        images = new * often[0] + (size * self.refreshes if of_sets else 0)
        lines = [
            f"{often[0]:,} rollouts of {args.num_subsets} subsets x {args.replace_size} images{chosen}",
            f"{images:,} images for training, {trainer.num_eval_images:,} in an evaluation",
            f"{sum(passes[:3]) / self.steps:,.0f} network evaluations an update, {sum(passes):,} in all",
            f"{sum(n for n, trained in parameters if trained):,} of {sum(n for n, _ in parameters):,} weights trained",
        ]
        if of_sets:
            held = f"{size * width * FLOAT / 2**20:,.1f} MiB of features"
            lines.append(f"reference set: {size:,} images, generated {self.refreshes} x; {held}")
        if trainer.train_dataset is None and classes > 1:
            lines.append(f"no train_dataset, so labels are all {classes} classes in balance")
        return "\n- ".join([f"The run: {self.steps:,} updates", *lines])


@dataclass(frozen=True)
class Prediction:
    """Cost of a run. Memory and disk are in bytes."""

    plan: Plan
    device: str
    processes: int
    seconds: dict[str, float]  # of an average update, by phase
    memory: float  # peak on this process's device
    capacity: float  # of that device
    checkpoint: float
    disk: float  # peak of the run
    free: float  # on disk
    problems: list[str]  # why the run does not fit, each with a remedy

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def device_hours(self) -> float:
        """Hours of the whole run, over all devices."""
        return sum(self.seconds.values()) * self.plan.steps * self.processes / 3600

    def __str__(self) -> str:
        p, total = self, sum(self.seconds.values())
        lines = [f"{p.plan.steps} updates on {p.processes} x {p.device}: {p.device_hours:,.2f} device-hours", ""]
        lines += ["phase         seconds an update   share"]
        lines += [f"{phase:12s}{s:19.3f}{s / total if total else 0:8.1%}" for phase, s in p.seconds.items()]
        lines += [f"{'all':12s}{total:19.3f}", ""]
        lines += ["network evaluations: " + ", ".join(f"{name} {v:,}" for name, v in p.plan.counts.items() if v)]
        lines += [f"peak memory: {p.memory / GIB:.2f} of {p.capacity / GIB:.2f} GiB"]
        disk = f"up to {p.disk / GIB:.2f} of {p.free / GIB:.2f} GiB"
        lines += [f"a checkpoint: {p.checkpoint / GIB:.3f} GiB; disk: {disk}"]
        lines += ["", *([f"does not fit: {problem}" for problem in p.problems] or ["fits"])]
        return "\n".join(lines)


def dry_run(trainer: "DistributionRewardTrainer") -> Prediction:
    """
    Generates the first batch of the reference set and makes one real update, and scales them to the run.

    The trainer cannot be used afterwards. All processes call it.
    """
    args, plan, device = trainer.args, Plan.of(trainer), trainer.accelerator.device
    capacity, run = memory_capacity(device), trainer.describe_run()
    size = min(trainer.eval_batch_size * run["processes"], len(trainer.conditions))
    args.max_steps, args.eval_strategy, args.save_strategy, args.eval_on_start = 1, "no", "no", False
    _shorten_refresh(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    problems, output_dir = [], args.output_dir
    with TemporaryDirectory() as args.output_dir:  # the record of a real run stays
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            problems.append(f"{capacity / GIB:.1f} GiB are not enough: {str(error).splitlines()[0]}")
    args.output_dir, spent = output_dir, trainer.run_record.seconds
    refresh = spent["refresh"] * len(trainer.conditions) / size
    per_pass = refresh / plan.counts["refresh"] if plan.counts["refresh"] else 0.0
    seconds = {
        "rollout": spent["rollout"] / args.num_iterations,
        "reward": spent["reward"] / args.num_iterations,
        "update": spent["training"],
        "refresh": refresh * plan.refreshes / plan.steps,
        "evaluation": per_pass * plan.counts["evaluation"] * plan.evaluations / plan.steps,
    }
    disk = disk_bytes(trainer, plan)
    problems += disk_problems(*disk)
    return Prediction(plan, run["device"], run["processes"], seconds, peak_memory(device), capacity, *disk, problems)


def _shorten_refresh(trainer: "DistributionRewardTrainer") -> None:
    """Makes the reference set from its first batch, repeated with other low bits in its pixels."""
    refresh, total = trainer.reference_set.refresh, trainer.args.reference_set_size

    def repeated(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        for images, conditions, valid, finite in islice(batches, 1):
            for count in range(0, total, valid):
                noise = torch.randint_like(images, 0, 8) * (count > 0)
                yield images ^ noise, conditions, min(valid, total - count), finite

    setattr(trainer.reference_set, "refresh", lambda batches, step: refresh(repeated(batches), step))  # noqa: B010


def memory_capacity(device: torch.device) -> float:
    """Bytes that this process may use on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().available / processes + psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return getrusage(RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def disk_bytes(trainer: "DistributionRewardTrainer", plan: Plan) -> tuple[float, float, float]:
    """Bytes of one checkpoint, the most bytes of the run on disk, and bytes free for it."""
    args, network = trainer.args, trainer.network
    parts = [network, *getattr(getattr(trainer.policy, "pipeline", None), "components", {}).values()]
    tensors = [t for m in parts if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())]
    pipeline = sum({id(t): t.nbytes for t in tensors}.values())
    trained = [p for p in network.parameters() if p.requires_grad]
    checkpoint = sum(p.nbytes for p in trained) if isinstance(network, PeftModel) else pipeline
    if not args.save_only_model:
        each = OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), 2 * FLOAT)
        each += 2 * FLOAT if args.ema_decay > 0 else 0  # the average, and the weights below it
        checkpoint += each * sum(p.numel() for p in trained)
        checkpoint += sum(v.nbytes for reward in trainer.rewards.of_sets for v in reward.features.values())
    saves = plan.checkpoints
    if args.save_total_limit is not None:  # a new one is whole before an old one goes
        saves = min(saves, max(args.save_total_limit, 2 if args.load_best_model_at_end else 1) + 1)
    path = Path(args.output_dir).absolute()
    there = next(parent for parent in [path, *path.parents] if parent.is_dir())
    old = sum(file.stat().st_size for file in path.glob("checkpoint-*/**/*") if file.is_file())
    return checkpoint, saves * checkpoint + pipeline, shutil.disk_usage(there).free + old


def disk_problems(checkpoint: float, disk: float, free: float) -> list[str]:
    if disk <= HEADROOM * free:
        return []
    sizes = f"{disk / GIB:.2f} GiB of disk, one of them {checkpoint / GIB:.2f}, and {free / GIB:.2f} GiB are free"
    return [f"checkpoints take up to {sizes}: set save_total_limit, save_only_model=True, or another output_dir."]


def check_disk(trainer: "DistributionRewardTrainer") -> None:
    """Raises `ValueError` if the disk is too small for the checkpoints: the run would fail late."""
    for problem in disk_problems(*disk_bytes(trainer, Plan.of(trainer))):
        raise ValueError(problem)
