# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The cost of a run before it starts: network evaluations by arithmetic; seconds and memory by one real update."""

import math
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from ..metrics.extractors import module_of

if TYPE_CHECKING:
    from .distribution_reward_trainer import DistributionRewardTrainer

GIB = 2**30
FLOAT = 4  # bytes of the float32 that weights, gradients and averages are kept in
OPTIMIZER_BYTES = {"sgd": 0, "adagrad": 4, "rmsprop": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 1}
# Share of the free memory that may be planned with: allocators round up, and fragments are lost
HEADROOM = 0.95

# What to lower if a phase runs out of memory
_REMEDIES = {
    "refresh": "lower per_device_eval_batch_size or decode_batch_size",
    "rollout": "lower rollout_batch_size or decode_batch_size, or set offload_trajectories=True",
    "reward": "lower num_subsets, or set offload_trajectories=True",
    "training": "lower per_device_train_batch_size, set activation_checkpointing=True, or train an adapter",
}


def count_evaluations(trainer: "DistributionRewardTrainer") -> dict[str, float]:
    """Network evaluations of all processes per rollout, update, refresh and evaluation; guidance counts twice."""
    args, policy = trainer.args, trainer.policy
    factor = 2 if getattr(policy, "guided", getattr(policy, "guidance_scale", 1.0) != 1.0) else 1
    images, steps = args.num_subsets * args.replace_size * args.best_of_n, args.rollout_schedule.num_steps
    counts = [schedule.num_evaluations or schedule.num_steps for schedule in args.eval_schedules.values()]
    found = {
        "rollout": images * steps,
        "update": trainer.estimator.num_passes(),
        "refresh": args.reference_set_size * steps if trainer.rewards.of_sets else 0,
        "evaluation": len(trainer.eval_conditions) * sum(counts),
    }
    return {name: factor * count for name, count in found.items()}


def num_refreshes(args: Any, steps: int) -> int:
    """Times that the reference set is generated in `steps` updates; `"auto"` counts like 10."""
    if args.reference_update == "rolling":
        return 1
    interval = 10 if args.reference_refresh_steps == "auto" else int(args.reference_refresh_steps)
    return math.ceil(steps / (math.ceil(interval / args.num_iterations) * args.num_iterations))


def describe_sizes(trainer: "DistributionRewardTrainer") -> str:
    """What a rollout, an update and a run consist of, in words."""
    args, counts, steps = trainer.args, count_evaluations(trainer), _total_steps(trainer)
    images = args.num_subsets * args.replace_size
    total = (
        counts["rollout"] * math.ceil(steps / args.num_iterations)
        + counts["update"] * steps
        + counts["refresh"] * num_refreshes(args, steps)
        + counts["evaluation"] * _num_evaluations(trainer, steps)
    )
    return (
        f"One rollout: {args.num_subsets} subsets of {args.replace_size} = {images} images, {counts['rollout']:,.0f} "
        f"network evaluations. One update: {counts['update']:,.0f} with backward pass. The run: {steps} updates, "
        f"{total:,.0f} network evaluations."
    )


def _total_steps(trainer: "DistributionRewardTrainer") -> int:
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * trainer.steps_per_epoch)


def _num_times(trainer: "DistributionRewardTrainer", strategy: str, interval: float | None, steps: int) -> int:
    if strategy == "no" or not interval:
        return 0
    every = trainer.steps_per_epoch if strategy == "epoch" else max(1, interval * steps if interval < 1 else interval)
    return int(steps // every)


def _num_evaluations(trainer: "DistributionRewardTrainer", steps: int) -> int:
    args = trainer.args
    return _num_times(trainer, args.eval_strategy, args.eval_steps, steps) + bool(args.eval_on_start)


@dataclass(frozen=True)
class Prediction:
    """
    Cost of a run.

    Attributes:
        device (`str`), processes, steps (`int`): device, number of processes, and updates of the whole run.
        evaluations (`dict[str, float]`): network evaluations, see `count_evaluations`.
        seconds (`dict[str, float]`): seconds of an average update, by phase.
        device_hours (`float`): of the whole run, over all devices.
        memory, capacity (`float`): most bytes used on this process's device, and bytes that it has.
        checkpoint, disk, free (`float`): bytes of one checkpoint, of the run's most on disk, and free on disk.
        problems (`list[str]`): why the run does not fit, each with a remedy.
    """

    device: str
    processes: int
    steps: int
    evaluations: dict[str, float]
    seconds: dict[str, float]
    device_hours: float
    memory: float
    capacity: float
    checkpoint: float
    disk: float
    free: float
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems


def dry_run(trainer: "DistributionRewardTrainer") -> Prediction:
    """
    Generates the first batch of the reference set and makes one real update, and scales them to the run.

    The trainer cannot be used afterwards. All processes call it.
    """
    steps, device = _total_steps(trainer), trainer.accelerator.device
    problems = _disk_problems(trainer, steps)
    capacity = memory_capacity(device)
    args, refresh = trainer.args, trainer.reference_set.refresh
    counts, evaluations = count_evaluations(trainer), _num_evaluations(trainer, steps)
    args.max_steps, args.eval_strategy, args.save_strategy, args.eval_on_start = 1, "no", "no", False
    size = min(args.per_device_eval_batch_size * trainer.accelerator.num_processes, len(trainer.conditions))
    setattr(  # noqa: B010
        trainer.reference_set, "refresh", lambda batches, step: refresh(_repeated(islice(batches, 1), trainer), step)
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: Mapping[str, float] = trainer.run_record.seconds
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        done = trainer.run_record.seconds
        phase = next((name for name in _REMEDIES if name not in done), "training")
        problems.append(f"{phase} runs out of the device's {capacity / GIB:.1f} GiB: {_REMEDIES[phase]}.")
    seconds = trainer.run_record.seconds
    reference = seconds.get("refresh", 0.0) * len(trainer.conditions) / size
    per_evaluation = reference / counts["refresh"] if counts["refresh"] else 0.0
    per_update = {
        "rollout": seconds.get("rollout", 0.0) / args.num_iterations,
        "reward": seconds.get("reward", 0.0) / args.num_iterations,
        "update": seconds.get("training", 0.0),
        "refresh": reference * num_refreshes(args, steps) / steps,
        "evaluation": per_evaluation * counts["evaluation"] * evaluations / steps,
    }
    checkpoint, disk, free = _disk(trainer, steps)
    processes = trainer.accelerator.num_processes
    return Prediction(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        processes=processes,
        steps=steps,
        evaluations=counts,
        seconds=per_update,
        device_hours=sum(per_update.values()) * steps * processes / 3600,
        memory=_peak_memory(device),
        capacity=capacity,
        checkpoint=checkpoint,
        disk=disk,
        free=free,
        problems=problems,
    )


def _repeated(
    batches: Iterable[tuple[Tensor, Any, int, Tensor]], trainer: "DistributionRewardTrainer"
) -> Iterator[tuple[Tensor, Any, int, Tensor]]:
    """Repeats the first batch until the reference set is full, with other pixels each time."""
    count, total = 0, trainer.args.reference_set_size
    for images, conditions, valid, finite in batches:
        while count < total:
            number = min(valid, total - count)
            noise = torch.randint_like(images, 0, 8) * (count > 0)
            yield images ^ noise, conditions, number, finite
            count += number


# ---- memory and disk ----


def memory_capacity(device: torch.device) -> float:
    """Bytes that this process may use on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().available / processes + psutil.Process().memory_info().rss


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _num_bytes(modules: Iterable[nn.Module | None]) -> int:
    tensors = {id(t): t.nbytes for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    return sum(tensors.values())


def _sizes(trainer: "DistributionRewardTrainer") -> tuple[float, float, int]:
    """Bytes that stay on the device, bytes of the saved pipeline, and number of trained parameters."""
    components = getattr(getattr(trainer.policy, "pipeline", None), "components", {})
    parts = [part for part in components.values() if isinstance(part, nn.Module) and part is not trainer.policy.model]
    extractors: list[Any] = [
        extractor for reward in trainer.rewards.of_sets for extractor in reward.extractors.values()
    ]
    extractors += [getattr(metric, "extractor", None) for metric in trainer.eval_metrics.values()]
    trained = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    optimizer = OPTIMIZER_BYTES.get(str(getattr(trainer.args.optim, "value", trainer.args.optim)), 2 * FLOAT)
    average = FLOAT if trainer.args.ema_decay > 0 else 0
    frozen = _num_bytes([*parts, *map(module_of, extractors), trainer.initial_model])
    held = _num_bytes([trainer.network]) + frozen + trained * (optimizer + average + FLOAT)
    return held, _num_bytes([trainer.network, *parts]), trained


def _disk(trainer: "DistributionRewardTrainer", steps: int) -> tuple[float, float, float]:
    """Bytes of one checkpoint, the most bytes of a run on disk, and bytes free for it."""
    args, (_, pipeline, trained) = trainer.args, _sizes(trainer)
    optimizer = OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), 2 * FLOAT)
    features = sum(v[0].nbytes for reward in trainer.rewards.of_sets for v in reward.features.values())
    state = trained * (optimizer + (2 * FLOAT if args.ema_decay > 0 else 0)) + features * args.reference_set_size
    checkpoint = pipeline + (0 if args.save_only_model else state)
    saves = _num_times(trainer, args.save_strategy, args.save_steps, steps)
    if args.save_total_limit is not None:  # a new one is whole before an old one goes
        saves = min(saves, max(args.save_total_limit, 2 if args.load_best_model_at_end else 1) + 1)
    path = Path(args.output_dir).absolute()
    there = next(parent for parent in [path, *path.parents] if parent.is_dir())
    old = sum(file.stat().st_size for file in path.glob("checkpoint-*/**/*") if file.is_file())
    return checkpoint, saves * checkpoint + pipeline, shutil.disk_usage(there).free + old


def _disk_problems(trainer: "DistributionRewardTrainer", steps: int) -> list[str]:
    checkpoint, disk, free = _disk(trainer, steps)
    if disk <= HEADROOM * free:
        return []
    return [
        f"checkpoints take up to {disk / GIB:.2f} GiB of disk, one of them {checkpoint / GIB:.2f}, and "
        f"{free / GIB:.2f} GiB are free: set save_total_limit, save_only_model=True, or another output_dir."
    ]


def check_resources(trainer: "DistributionRewardTrainer") -> None:
    """
    Refuses a run whose weights and optimizer do not fit the device, or whose checkpoints do not fit the disk.

    Raises:
        RuntimeError: with the numbers, and the settings to change.
    """
    problems = _disk_problems(trainer, _total_steps(trainer))
    split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    need, capacity = _sizes(trainer)[0], HEADROOM * memory_capacity(trainer.accelerator.device)
    if need > capacity and not split:
        problems.append(
            f"weights, gradients and optimizer take {need / GIB:.2f} GiB of {capacity / GIB:.2f} GiB, before any "
            "activation: train an adapter (use_peft), set ema_decay=0, or launch with "
            "examples/accelerate_configs/fsdp2.yaml."
        )
    if problems:
        raise RuntimeError("this run cannot fit:\n" + "\n".join(f"- {problem}" for problem in problems))


def format_prediction(prediction: Prediction) -> str:
    """Formats a prediction for a person."""
    p, total = prediction, sum(prediction.seconds.values())
    lines = [f"{p.steps} updates on {p.processes} x {p.device}: {p.device_hours:,.2f} device-hours", ""]
    lines += ["phase         seconds an update   share"]
    for phase, seconds in p.seconds.items():
        lines.append(f"{phase:12s}{seconds:19.3f}{seconds / total if total else 0:8.1%}")
    lines += [f"{'all':12s}{total:19.3f}", ""]
    named = ", ".join(f"{name} {value:,.0f}" for name, value in p.evaluations.items() if value)
    lines += [f"network evaluations: {named}"]
    lines += [f"peak memory: {p.memory / GIB:.2f} of {p.capacity / GIB:.2f} GiB"]
    lines += [
        f"disk: {p.checkpoint / GIB:.3f} GiB a checkpoint, up to {p.disk / GIB:.2f} of {p.free / GIB:.2f} GiB",
        "",
    ]
    lines += [f"does not fit: {problem}" for problem in p.problems] or ["fits"]
    return "\n".join(lines)
