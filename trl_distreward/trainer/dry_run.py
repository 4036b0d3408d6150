# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The cost of a run before it starts: predicted for a GPU by arithmetic, or measured by one real update."""

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

from . import costs
from .costs import FLOAT, GPUS, Plan
from .image_sets import ImageBatch

if TYPE_CHECKING:
    from .distribution_reward_trainer import DistributionRewardTrainer

GIB = 2**30
HEADROOM = 0.95  # share of the free disk to plan with


@dataclass(frozen=True)
class Prediction:
    """Cost of a run, predicted or measured. Memory and disk are in bytes."""

    plan: Plan
    device: str
    processes: int
    flops: dict[str, float]  # of an average update of all processes, by phase
    parts: dict[str, float]  # of the memory, by arithmetic
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
        lines += ["phase         seconds an update   share        TFLOP"]
        for phase, s in p.seconds.items():
            share = s / total if total else 0.0
            lines += [f"{phase:12s}{s:19.3f}{share:8.1%}{p.flops.get(phase, 0) / 1e12:13,.3f}"]
        lines += [f"{'all':12s}{total:19.3f}{sum(p.flops.values()) / 1e12:21,.3f}", ""]
        lines += ["network evaluations: " + ", ".join(f"{name} {v:,}" for name, v in p.plan.counts.items() if v)]
        lines += [f"peak memory: {p.memory / GIB:.2f} of {p.capacity / GIB:.2f} GiB; by arithmetic:"]
        lines += [f"  {name:22s}{size / GIB:9.3f} GiB" for name, size in p.parts.items() if size]
        disk = f"up to {p.disk / GIB:.2f} of {p.free / GIB:.2f} GiB"
        lines += [f"a checkpoint: {p.checkpoint / GIB:.3f} GiB; disk: {disk}"]
        lines += ["", *([f"does not fit: {problem}" for problem in p.problems] or ["fits"])]
        return "\n".join(lines)


def predict(trainer: "DistributionRewardTrainer", device: str) -> Prediction:
    """Predicts the cost of the run on one of `GPUS`, without running the network; see docs/howto/costs.md."""
    args, plan, processes = trainer.args, Plan.of(trainer), trainer.accelerator.num_processes
    (flops, parts), (bf16, float32, capacity) = costs.count(trainer, plan), GPUS[device]
    rate = processes * costs.UTILISATION * (bf16 if args.bf16 or args.fp16 else float32)
    seconds = {phase: value / rate for phase, value in flops.items()}
    # an eigendecomposition in each space, whenever the set changes
    stays = args.reference_update == "refresh" and not trainer.estimator.replaces_all
    fits = (plan.refreshes if stays else plan.rollouts) / plan.steps
    seconds["reward"] = fits * sum(9 * width**3 for width in costs.feature_widths(trainer)) / costs.EIGH_RATE
    memory, disk = sum(parts.values()), disk_bytes(trainer, plan)
    problems = disk_problems(*disk)
    if memory > capacity:
        remedy = "lower per_device_train_batch_size, set activation_checkpointing=True, or train an adapter"
        problems.append(f"{memory / GIB:.1f} GiB are more than {capacity / GIB:.1f}: {remedy}.")
    name = f"{device.upper()}, predicted"
    return Prediction(plan, name, processes, flops, parts, seconds, memory, capacity, *disk, problems)


def dry_run(trainer: "DistributionRewardTrainer") -> Prediction:
    """Measures one real update and the reference set's first batch, and scales them. The trainer is used up."""
    args, plan, device = trainer.args, Plan.of(trainer), trainer.accelerator.device
    capacity, run, counted = memory_capacity(device), trainer.describe_run(), costs.count(trainer, plan)
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
        "update": spent["training"] + spent["preparation"] / args.num_iterations,
        "refresh": refresh * plan.refreshes / plan.steps,
        "evaluation": per_pass * plan.counts["evaluation"] * plan.evaluations / plan.steps,
    }
    disk = disk_bytes(trainer, plan)
    problems += disk_problems(*disk)
    return Prediction(
        plan, run["device"], run["processes"], *counted, seconds, peak_memory(device), capacity, *disk, problems
    )


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
    pipeline = costs.bytes_of(parts)
    trained = [p for p in network.parameters() if p.requires_grad]
    checkpoint = sum(p.nbytes for p in trained) if isinstance(network, PeftModel) else pipeline
    if not args.save_only_model:
        each = costs.optimizer_bytes(args.optim)
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
