# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a run will cost, predicted before it starts, and whether it can run at all."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..metrics.extractors import FEATURE_BATCH, module_of
from ..policies import to_uint8
from .checkpoints import HALF_PRECISION
from .estimates import (
    FLOAT,
    Evaluations,
    Network,
    Transients,
    checkpoint_bytes,
    count_evaluations,
    disk_bytes,
    num_events,
    num_kept_images,
    num_means,
    num_refreshes,
    num_states,
    peak_memory,
    resident_bytes,
    rows_per_process,
    trajectory_bytes,
)
from .measurement import Measurement, guidance_factor, measure, start_noise

# Share of the free memory that a prediction may take: allocators round up, and fragments are lost.
HEADROOM = 0.95
GIB = 2**30


def networks(trainer: Any) -> Network:
    """Sizes of what the trainer holds, before processes share it out."""
    network = trainer.network
    pipeline = getattr(trainer.policy, "pipeline", None)
    parts = [] if pipeline is None else [p for p in pipeline.components.values() if isinstance(p, nn.Module)]
    parts = [part for part in parts if part is not trainer.policy.model]
    extractors = [e for reward in trainer.distribution_rewards for e in reward.extractors.values()]
    extractors += [getattr(metric, "extractor", None) for metric in trainer.eval_metrics.values()]
    modules = [*parts, *map(module_of, [*extractors, *trainer.reward_funcs]), trainer.reference_model]
    # several rewards may share a network
    beside = {id(t): t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    adapted = FLOAT * trained if trainer.policy.model is not network else 0
    weights = _bytes(network)
    copies = 2 if hasattr(pipeline, "save_lora_weights") else 1  # peft's file, and diffusers'
    return Network(
        weights=weights,
        trained=trained,
        frozen=sum(t.nbytes for t in beside.values()),
        saved=_bytes(network, as_saved=True) - adapted + sum(map(_bytes, parts)),
        adapter=copies * adapted,
    )


def _bytes(module: nn.Module, as_saved: bool = False) -> int:
    """Of parameters and buffers; an adapted network is saved in float32."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * FLOAT if as_saved and t.dtype in HALF_PRECISION else t.nbytes for t in tensors)


def _shards(trainer: Any) -> tuple[int, int]:
    """Over how many processes weights, and optimizer and gradients, are shared out."""
    processes = trainer.accelerator.num_processes
    if trainer.is_fsdp_enabled:
        return processes, processes
    if trainer.is_deepspeed_enabled:
        whole = trainer.accelerator.state.deepspeed_plugin.zero_stage < 3
        return 1 if whole else processes, processes
    return 1, 1


def _total_steps(trainer: Any) -> int:
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * trainer.steps_per_epoch)


def _sizes(trainer: Any) -> tuple[int, int, int]:
    """Bytes of one sample, of one image, and of the reference set's features."""
    x, conditions = start_noise(trainer, 2)
    with torch.no_grad():
        images = to_uint8(trainer.policy.decode(x))
        spaces = [
            values for reward in trainer.distribution_rewards for values in reward.extract(images, conditions).values()
        ]
    reference = sum(trainer.args.reference_set_size * values[0].nbytes for values in spaces)
    return x[0].nbytes, images[0].nbytes, reference


def memory_capacity(trainer: Any, held: float) -> float:
    """Bytes that this process may come to hold on its device, with the `held` ones that it has there."""
    device = trainer.accelerator.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().available / processes + held


def free_disk(folder: str | os.PathLike) -> int:
    """Bytes free where `folder` is or will be, and those of checkpoints that a run in it will delete or reuse."""
    path = Path(folder).absolute()
    there = next(parent for parent in [path, *path.parents] if parent.is_dir())
    old = sum(file.stat().st_size for file in path.glob("checkpoint-*/**/*") if file.is_file())
    return shutil.disk_usage(there).free + old


@dataclass(frozen=True)
class Prediction:
    """
    What a run will cost.

    Attributes:
        device (`str`): name of the device.
        processes, steps (`int`): processes, and optimizer steps of the whole run.
        evaluations ([`Evaluations`]): network evaluations of one process.
        evaluations_per_step (`float`): of training, on average over the run.
        memory (`dict[str, float]`): most bytes on a device, by phase.
        capacity (`float`): bytes it has for this process.
        seconds (`dict[str, float]`): of an average optimizer step, by phase.
        device_hours (`float`): of the whole run, over all devices.
        checkpoint (`dict[str, int]`): bytes of one checkpoint, by what is in it.
        disk, free (`int`): most bytes of the run on disk, and what is free there.
        problems (`list[str]`): why it cannot run, each with the settings to change; empty if it can.
    """

    device: str
    processes: int
    steps: int
    evaluations: Evaluations
    evaluations_per_step: float
    memory: dict[str, float]
    capacity: float
    seconds: dict[str, float]
    device_hours: float
    checkpoint: dict[str, int]
    disk: int
    free: int
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems


def dry_run(trainer: Any) -> Prediction:
    """
    Measures one micro-batch of each phase and predicts what the run takes. All processes call it.

    The trainer cannot be used afterwards: its first step was not a step.

    Args:
        trainer ([`DistributionRewardTrainer`]): set up to train.
    """
    network, sizes = networks(trainer), _sizes(trainer)
    weight_shards, state_shards = _shards(trainer)
    resident = resident_bytes(trainer.args, network, weight_shards, state_shards)
    capacity = memory_capacity(trainer, resident["weights"] + resident["average"] + resident["frozen networks"])
    measurement = measure(trainer)
    return predict(trainer, network, sizes, measurement, capacity)


def predict(
    trainer: Any, network: Network, sizes: tuple[int, int, int], measurement: Measurement, capacity: float
) -> Prediction:
    """The prediction that follows from a [`Measurement`]; other arguments as `dry_run` has them."""
    args, accelerator = trainer.args, trainer.accelerator
    processes, steps = accelerator.num_processes, _total_steps(trainer)
    sample, image, reference = sizes
    per_image = _per_image(trainer)
    evaluations = evaluations_of(trainer, measurement.adaptive_evaluations)
    refreshes = num_refreshes(args, steps) if trainer.distribution_rewards else 0

    weight_shards, state_shards = _shards(trainer)
    resident = resident_bytes(args, network, weight_shards, state_shards)
    gradients = FLOAT * network.trained / state_shards
    if processes > 1 and state_shards == 1:
        gradients *= 2  # DDP sends them from buckets of its own
    kept = image if trainer.rollouts.judge.keep_images else 0
    trajectories = trajectory_bytes(args, sample, kept, processes, per_image)
    memory = peak_memory(args, resident, gradients, trajectories, measurement.transients)

    seconds = seconds_per_step(trainer, measurement, evaluations, refreshes, steps)
    checkpoint, disk = _disk(trainer, network, sample, reference, steps)
    free = free_disk(args.output_dir)
    on_cuda = accelerator.device.type == "cuda"
    return Prediction(
        device=torch.cuda.get_device_name(accelerator.device) if on_cuda else "CPU",
        processes=processes,
        steps=steps,
        evaluations=evaluations,
        evaluations_per_step=evaluations.of_training(steps, args.num_iterations, refreshes) / steps,
        memory=memory,
        capacity=capacity,
        seconds=seconds,
        device_hours=sum(seconds.values()) * steps * processes / 3600,
        checkpoint=checkpoint,
        disk=disk,
        free=free,
        problems=memory_problems(trainer, memory, trajectories, measurement, HEADROOM * capacity)
        + disk_problems(args, checkpoint, disk, free),
    )


def evaluations_of(trainer: Any, adaptive_evaluations: float = 0.0) -> Evaluations:
    """Network evaluations of one of the trainer's processes."""
    return count_evaluations(
        trainer.args,
        processes=trainer.accelerator.num_processes,
        guided=guidance_factor(trainer) == 2,
        per_image=_per_image(trainer),
        has_reference=bool(trainer.distribution_rewards),
        num_eval_images=len(trainer.eval_conditions),
        adaptive_evaluations=adaptive_evaluations,
    )


def _per_image(trainer: Any) -> bool:
    """Whether every image has a reward of its own."""
    rewards = trainer.distribution_rewards
    return len(rewards) < len(trainer.reward_funcs) or any(reward.credit == "leave_one_in" for reward in rewards)


def seconds_per_step(
    trainer: Any, measurement: Measurement, evaluations: Evaluations, refreshes: int, steps: int
) -> dict[str, float]:
    """Of an average optimizer step, by phase; what happens every so often is shared out over all steps."""
    args, processes, m = trainer.args, trainer.accelerator.num_processes, measurement
    images = args.num_subsets * args.replace_size / processes
    pairs, judged, scored = evaluations.update / guidance_factor(trainer), images * args.best_of_n, 1
    if args.loss_type == "backprop":
        scored = args.backprop_draws
        pairs = images * scored  # an image's steps were measured together
        judged = images * (1 + scored if scored > 1 else 1)  # the sampler's own images besides the draws
    size = args.per_device_eval_batch_size
    reference = rows_per_process(args.reference_set_size, size, processes)
    schedules = len(args.eval_schedules)
    decoded = rows_per_process(len(trainer.eval_conditions), size, processes) * schedules
    evaluated = len(trainer.eval_conditions) * schedules  # by every process: each has the images of all
    count = num_events(args.eval_strategy, args.eval_steps, steps, trainer.steps_per_epoch) + bool(args.eval_on_start)
    rolling = args.reference_update == "rolling"
    per_generation = {
        "rollout": evaluations.rollout * m.evaluation + judged * m.decoding,
        "reward": judged * m.features + scored * m.scoring + (m.fitting if rolling else 0.0),
    }
    return {
        **{phase: seconds / args.num_iterations for phase, seconds in per_generation.items()},
        "update": pairs * m.pair + evaluations.anchor * m.evaluation / args.num_iterations + m.optimizer,
        "refresh": (evaluations.refresh * m.eval_evaluation + reference * (m.eval_decoding + m.features) + m.fitting)
        * refreshes
        / steps,
        "evaluation": (evaluations.evaluation * m.eval_evaluation + decoded * m.eval_decoding + evaluated * m.judging)
        * count
        / steps,
    }


# ---- what does not fit ----


def memory_problems(
    trainer: Any,
    memory: Mapping[str, float],
    trajectories: tuple[float, float],
    measurement: Measurement,
    limit: float,
) -> list[str]:
    """Phases that take more than `limit` bytes, and what to change."""
    transients, problems = measurement.transients, []
    for phase, need in memory.items():
        if need <= limit:
            continue
        remedies = _smaller_batches(trainer, phase, transients, need - limit)
        if phase == "update" and not getattr(trainer.policy.model, "gradient_checkpointing", False):
            remedies.append("activation_checkpointing=True")
        if phase in ("rollout", "reward", "update") and sum(trajectories) > (need - limit):
            remedies.append("offload_trajectories=True")
        if not remedies:
            remedies = _smaller_state(trainer)
        problems.append(
            f"{phase} takes {need / GIB:.2f} GiB of the {limit / GIB:.2f} GiB that may be used: "
            f"set {' or '.join(remedies)}."
        )
    return problems


def _smaller_batches(trainer: Any, phase: str, transients: Transients, excess: float) -> list[str]:
    """Sizes of batches each of which makes `phase` take `excess` bytes less; none where no size does."""
    args, t = trainer.args, transients
    batches = {
        "rollout": ("rollout_batch_size", args.rollout_batch_size or args.per_device_train_batch_size),
        "update": ("per_device_train_batch_size", args.per_device_train_batch_size),
        "evaluation": ("per_device_eval_batch_size", args.per_device_eval_batch_size),
    }
    if phase not in batches:
        return []
    name, size = batches[phase]
    decoded = min(args.decode_batch_size or size, size)
    # bytes, how many rows of the batch take them at a time, and whether those are the rows decoded at a time
    if phase == "update":
        parts = [(t.update, size, False)]
    elif phase == "rollout":
        whole = trainer.rollouts.judge.keep_images  # for rewards that look at all images at once
        parts = [(t.rollout, size, False), (t.decoding, decoded, True)]
        parts += [(t.features, size if whole else decoded, not whole)]
    else:
        extracted = min(size, max(1, FEATURE_BATCH // trainer.accelerator.num_processes))
        parts = [(t.evaluation, size, False), (t.eval_decoding, decoded, True), (t.judging, extracted, False)]
    room = max(part for part, *_ in parts) - excess
    if room <= 0:
        return []
    large = [(int(rows * room / part), of_decoding) for part, rows, of_decoding in parts if part > room]
    fitting = min(rows for rows, _ in large)
    if fitting < 1:
        return []
    remedies = [f"{name}={fitting}"]
    if all(of_decoding for _, of_decoding in large):
        remedies.insert(0, f"decode_batch_size={fitting}")
    return remedies


def _smaller_state(trainer: Any) -> list[str]:
    """Settings that shrink what stays on the device whatever the micro-batch."""
    remedies = []
    if trainer.policy.model is trainer.network:
        remedies.append("use_peft=True")
    if trainer.args.ema_decay > 0:
        remedies.append("ema_decay=0")
    if trainer.args.beta > 0:
        remedies.append("beta=0")
    return [*remedies, "a launch that shares the weights out, examples/accelerate_configs/fsdp2.yaml"]


def disk_problems(args: Any, checkpoint: Mapping[str, int], disk: int, free: int) -> list[str]:
    if disk <= HEADROOM * free:
        return []
    one = sum(checkpoint.values())
    room = int(HEADROOM * free / one) - 2 if one else 0  # beside those kept, the new one and the last model
    remedy = f"save_total_limit={room}" if room >= 1 else "save_only_model=True, or an output_dir with more space"
    return [
        f"checkpoints take up to {disk / GIB:.2f} GiB of disk, one of them {one / GIB:.2f}, and {free / GIB:.2f} GiB "
        f"are free: set {remedy}."
    ]


def check_resources(trainer: Any) -> None:
    """
    Refuses a run that cannot fit whatever its micro-batches: by what stays on the device, and by its checkpoints.

    Raises:
        RuntimeError: with the numbers, and the settings to change.
    """
    args, network, (sample, _, reference) = trainer.args, networks(trainer), _sizes(trainer)
    weight_shards, state_shards = _shards(trainer)
    resident = resident_bytes(args, network, weight_shards, state_shards)
    held = resident["weights"] + resident["average"] + resident["frozen networks"]
    need = sum(resident.values()) + FLOAT * network.trained / state_shards
    capacity, problems = HEADROOM * memory_capacity(trainer, held), []
    if need > capacity:
        problems.append(
            f"weights, gradients and optimizer take {need / GIB:.2f} GiB of the {capacity / GIB:.2f} GiB that may be "
            f"used, before any activation: set {' or '.join(_smaller_state(trainer))}."
        )
    checkpoint, disk = _disk(trainer, network, sample, reference, _total_steps(trainer))
    problems += disk_problems(args, checkpoint, disk, free_disk(args.output_dir))
    if problems:
        raise RuntimeError("this run cannot fit:\n" + "\n".join(f"- {problem}" for problem in problems))


def _disk(trainer: Any, network: Network, sample: int, reference: int, steps: int) -> tuple[dict[str, int], int]:
    args = trainer.args
    buffer = 0
    if args.num_iterations > 1:
        buffer = num_kept_images(args, _per_image(trainer)) * (num_states(args) + num_means(args)) * sample
    checkpoint = checkpoint_bytes(args, network, reference, buffer)
    saves = num_events(args.save_strategy, args.save_steps, steps, trainer.steps_per_epoch, at_end=True)
    return checkpoint, disk_bytes(args, sum(checkpoint.values()), network, saves)


def format_prediction(prediction: Prediction) -> str:
    """The prediction as a person reads it."""
    p, total = prediction, sum(prediction.seconds.values())
    where = f"{p.processes} x {p.device}" if p.processes > 1 else p.device
    lines = [f"{p.steps} steps on {where}, {p.device_hours:,.2f} device-hours", ""]
    lines += ["phase         seconds a step   share   peak memory, GiB"]
    for phase in dict.fromkeys([*p.seconds, *p.memory]):
        seconds, memory = p.seconds.get(phase), p.memory.get(phase)
        share = "" if seconds is None or total == 0 else f"{seconds / total:6.1%}"
        clock = "" if seconds is None else f"{seconds:14.3f}"
        held = "" if memory is None else f"{memory / GIB:18.2f}"
        lines.append(f"{phase:12s}{clock:>16s}{share:>8s}{held:>19s}")
    lines += [f"{'all':12s}{total:16.3f}{'':8s}{max(p.memory.values()) / GIB:19.2f} of {p.capacity / GIB:.2f}", ""]
    lines += [f"network evaluations of a process: {p.evaluations_per_step:,.1f} a step"]
    named = vars(p.evaluations).items()
    lines += ["  " + ", ".join(f"{name} {value:,.0f}" for name, value in named if value), ""]
    parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in p.checkpoint.items() if size)
    lines += [f"a checkpoint: {sum(p.checkpoint.values()) / GIB:.3f} GiB ({parts})"]
    lines += [f"disk: up to {p.disk / GIB:.2f} GiB, {p.free / GIB:.2f} GiB free", ""]
    lines += [f"does not fit: {problem}" for problem in p.problems] or ["fits"]
    return "\n".join(lines)
