# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a run takes: network evaluations, bytes of memory and of disk, in closed form from its configuration.

Nothing is measured here, see `dry_run.py` for that; nothing needs a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .objective import select

FLOAT = 4  # bytes of the float32 that weights, gradients, averages and trajectories are kept in
# Bytes of the optimizer's state per trained parameter; AdamW's two moments where the optimizer is not listed.
OPTIMIZER_BYTES = {"sgd": 0, "adagrad": 4, "rmsprop": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 1}


# ---- how often ----


def num_kept_images(args: Any, per_image: bool = False, processes: int = 1) -> int:
    """Images of a generation that are selected, over all processes; `per_image` where each has its own reward."""
    columns = args.replace_size if per_image else 1
    advantages = torch.arange(args.num_subsets * columns, dtype=torch.float64).view(args.num_subsets, columns)
    shares = processes if args.selection_scope == "local" else 1
    mask = select(advantages, args.selection, args.top_advantage_quantile, shares)
    return int(mask.sum()) * args.replace_size // columns


def num_trained_steps(args: Any) -> int:
    """Steps of each trajectory that are trained."""
    if args.loss_type == "rft":
        return 1
    noisy = len(args.rollout_schedule.trainable_steps) if args.sde_window_size is None else args.sde_window_size
    return max(1, round(args.timestep_fraction * noisy))


def num_backprop_steps(args: Any) -> float:
    """Steps that gradients go back through, on average."""
    return (1 + args.num_inference_steps) / 2 if args.backprop_steps == "random" else int(args.backprop_steps)


def num_refreshes(args: Any, steps: int) -> int:
    """Times that the reference set is generated in `steps` optimizer steps; `"auto"` is taken for the paper's 10."""
    if args.reference_update == "rolling":
        return 1
    interval = 10 if args.reference_refresh_steps == "auto" else int(args.reference_refresh_steps)
    # looked at when images are generated
    interval = math.ceil(interval / args.num_iterations) * args.num_iterations
    return math.ceil(steps / interval)


def num_events(strategy: str, interval: float | None, steps: int, epoch: int, at_end: bool = False) -> int:
    """
    Times that something happens in `steps` optimizer steps.

    Args:
        strategy (`str`): `"no"`, `"steps"`, `"epoch"`, or `"best"`, which is taken for the interval's.
        interval (`float` or `None`): steps between two times, or below 1 a share of all.
        epoch (`int`): steps of an epoch.
        at_end (`bool`, *optional*, defaults to `False`): whether it happens after the last step in any case.
    """
    if strategy == "no" or not interval:
        return 0
    every = epoch if strategy == "epoch" else math.ceil(interval * steps) if interval < 1 else int(interval)
    return steps // every + (1 if at_end and steps % every else 0)


def rows_per_process(count: int, batch_size: int, processes: int) -> int:
    """Images that each process makes so that all together make `count`, in batches that are filled up."""
    return sum(
        math.ceil(min(batch_size * processes, count - start) / processes)
        for start in range(0, count, batch_size * processes)
    )


def batch_arithmetic(args: Any, processes: int) -> str:
    """What a generation and an update are made of, in words."""
    images, evaluations = args.num_subsets * args.replace_size, args.rollout_schedule.num_steps
    own, size = images // processes, args.per_device_train_batch_size
    if args.loss_type == "backprop":
        steps = "a random number of" if args.backprop_steps == "random" else f"the last {args.backprop_steps}"
        draws = f", {args.backprop_draws} times" if args.backprop_draws > 1 else ""
        return (
            f"One update: {images} images ({own} per process), {images * evaluations} network evaluations, then "
            f"forward and backward through {steps} steps of each{draws}, {size} images at a time."
        )
    trained, quantile = num_trained_steps(args), args.top_advantage_quantile
    share = {"all": 1.0, "top": quantile, "top_bottom": min(1, 2 * quantile)}
    kept = round(args.num_subsets * share[args.selection]) * args.replace_size
    micro_batches = math.ceil(math.ceil(kept / processes) * trained / size)
    return (
        f"One generation: {args.num_subsets} subsets x {args.replace_size} = {images} images ({own} per process), "
        f"{images * args.best_of_n * evaluations} network evaluations. One update: about {kept} images x {trained} "
        f"steps = {kept * trained} pairs, {micro_batches} micro-batches of at most {size} per process, forward and "
        "backward."
    )


@dataclass(frozen=True)
class Evaluations:
    """
    Network evaluations by one process: one sample through the network once; guidance takes two.

    Attributes:
        rollout (`float`): per generation of `num_iterations` updates.
        anchor (`float`): per generation, scoring it once more off-policy.
        update (`float`): per update, each with a backward pass but for what checkpointing computes again.
        initial (`float`): per update, by the network before training, for the KL.
        refresh (`float`): per generation of the reference set.
        evaluation (`float`): per evaluation, over all schedules.
    """

    rollout: float
    anchor: float
    update: float
    initial: float
    refresh: float
    evaluation: float

    def of_training(self, steps: int, num_iterations: int, refreshes: int) -> float:
        """In the first `steps` updates, without evaluations."""
        generations = math.ceil(steps / num_iterations)
        return (
            generations * (self.rollout + self.anchor)
            + steps * (self.update + self.initial)
            + refreshes * self.refresh
        )


def count_evaluations(
    args: Any,
    *,
    processes: int = 1,
    guided: bool = False,
    per_image: bool = False,
    has_reference: bool = True,
    num_eval_images: int = 0,
    adaptive_evaluations: float = 0.0,
) -> Evaluations:
    """
    Network evaluations of one process.

    Args:
        args ([`DiffusionDistributionConfig`]): the recipe.
        processes (`int`, *optional*, defaults to 1): processes that share the work.
        guided (`bool`, *optional*, defaults to `False`): whether each evaluation is of two samples.
        per_image (`bool`, *optional*, defaults to `False`): whether every image has a reward of its own.
        has_reference (`bool`, *optional*, defaults to `True`): whether there is a reference set.
        num_eval_images (`int`, *optional*, defaults to 0): images of an evaluation.
        adaptive_evaluations (`float`, *optional*, defaults to 0.0): per image, where the solver decides on its steps.
    """
    each = 2 if guided else 1
    images = args.num_subsets * args.replace_size // processes
    steps = args.rollout_schedule.num_steps
    rollout = images * steps * args.best_of_n
    anchor = 0.0
    if args.loss_type == "backprop":
        trained = num_backprop_steps(args)
        rollout += images * args.backprop_draws if args.backprop_draws > 1 else 0
        pairs = images * trained * args.backprop_draws
        # the pull is on velocities at samples held still: those of all steps but the first are evaluated for it
        held = images * (trained - 1) * args.backprop_draws if args.beta > 0 else 0
        update = (pairs + held) * (2 if args.checkpoint_steps else 1)
        if processes > 1:
            update += 1  # DDP sends the summed gradients at the end of one more sample's pass
    else:
        pairs = math.ceil(num_kept_images(args, per_image, processes) / processes) * num_trained_steps(args)
        update = pairs
        anchor = pairs if args.num_iterations > 1 else 0
    size = args.per_device_eval_batch_size
    refresh = rows_per_process(args.reference_set_size, size, processes) * steps if has_reference else 0
    per_image_evaluations = sum(
        adaptive_evaluations if schedule.num_evaluations is None else schedule.num_evaluations
        for schedule in args.eval_schedules.values()
    )
    return Evaluations(
        rollout=each * rollout,
        anchor=each * anchor,
        update=each * update,
        initial=each * pairs if args.beta > 0 else 0,
        refresh=each * refresh,
        evaluation=each * rows_per_process(num_eval_images, size, processes) * per_image_evaluations,
    )


# ---- memory ----


@dataclass(frozen=True)
class Network:
    """
    What is trained and what stands beside it, in bytes.

    Attributes:
        weights (`int`): the network's parameters and buffers.
        trained (`int`): parameters that are trained, a number.
        frozen (`int`): VAE, feature extractors, text encoders, and the network before training where there is one.
        saved (`int`): the pipeline as it is saved.
        adapter (`int`): the adapter as it is saved; 0 without one.
    """

    weights: int
    trained: int
    frozen: int
    saved: int
    adapter: int = 0


def optimizer_bytes(args: Any, trained: int) -> int:
    name = str(getattr(args.optim, "value", args.optim))
    return OPTIMIZER_BYTES.get(name, 2 * FLOAT) * trained


def resident_bytes(args: Any, network: Network, weight_shards: int = 1, state_shards: int = 1) -> dict[str, float]:
    """
    What stays on a device: weights and average are shared out over `weight_shards` processes, the optimizer's state
    over `state_shards`.
    """
    return {
        "weights": network.weights / weight_shards,
        "optimizer": optimizer_bytes(args, network.trained) / state_shards,
        "average": (FLOAT * network.trained if args.ema_decay > 0 else 0) / weight_shards,
        "frozen networks": network.frozen,
    }


def num_states(args: Any) -> int:
    """Samples kept of every trajectory until it is trained on."""
    if args.loss_type == "backprop":
        steps = args.num_inference_steps if args.backprop_steps == "random" else int(args.backprop_steps)
        return steps + 1 + (2 * args.backprop_draws if args.backprop_draws > 1 else 0)
    steps = num_trained_steps(args)
    if args.timestep_fraction == 1.0 or args.loss_type == "rft":
        return steps + 1  # neighbours share an end
    return min(2 * steps, args.num_inference_steps + 1)


def num_means(args: Any) -> int:
    """Means of steps kept of every trained trajectory, samples by size."""
    return num_trained_steps(args) if args.ratio_normalization and args.num_iterations > 1 else 0


def trajectory_bytes(args: Any, sample: int, image: int, processes: int, per_image: bool) -> tuple[float, float]:
    """
    Bytes of one process's trajectories on the device: as generated, and as dealt out for the update.

    Args:
        sample, image (`int`): bytes of one float32 sample, and of what is kept of its image: of uint8, or 0.
    """
    images = args.num_subsets * args.replace_size / processes
    kept = images
    if args.loss_type != "backprop":
        kept = math.ceil(num_kept_images(args, per_image, processes) / processes)
    if args.offload_trajectories:
        return images * args.best_of_n * image, 0
    generated = images * args.best_of_n * (num_states(args) * sample + image)
    return generated, kept * (num_states(args) + num_means(args)) * sample


@dataclass(frozen=True)
class Transients:
    """
    Bytes that come and go, as measured: at most beyond what was held before.

    Attributes:
        rollout, decoding, features, update (`float`): of one micro-batch.
        evaluation, eval_decoding, judging (`float`):
            of one batch of evaluation: the network's, decoding, and the metrics' of the images of all processes.
        reward (`float`): of scoring all subsets of a process.
        reference (`float`): what the reward holds of its reference set.
    """

    rollout: float = 0.0
    decoding: float = 0.0
    features: float = 0.0
    update: float = 0.0
    evaluation: float = 0.0
    eval_decoding: float = 0.0
    judging: float = 0.0
    reward: float = 0.0
    reference: float = 0.0


def peak_memory(
    args: Any,
    resident: Mapping[str, float],
    gradients: float,
    trajectories: tuple[float, float],
    transients: Transients,
) -> dict[str, float]:
    """Most bytes that a device holds in each phase of a step."""
    base = sum(resident.values()) + transients.reference
    generated, dealt = trajectories
    swapped = resident["average"]  # the trained weights wait while the average is evaluated
    return {
        # the last update's trajectories are let go only when there are new ones
        "rollout": base + dealt + generated + max(transients.rollout, transients.decoding, transients.features),
        "reward": base + dealt + generated + transients.reward,
        "update": base + gradients + dealt + transients.update,
        "evaluation": base
        + swapped
        + dealt
        + max(transients.evaluation, transients.eval_decoding, transients.judging),
    }


# ---- disk ----


def checkpoint_bytes(args: Any, network: Network, reference: int, buffer: int = 0) -> dict[str, int]:
    """
    Bytes of one checkpoint by what is in it.

    Args:
        reference (`int`): bytes of the reference set's features.
        buffer (`int`, *optional*, defaults to 0):
            bytes of the trajectories, over all processes, that a checkpoint within a generation's updates has.
    """
    trained = FLOAT * network.trained
    parts = {"pipeline": network.saved, "adapter": network.adapter, "reference set": reference}
    averaged = trained if args.ema_decay > 0 else 0
    if not args.save_only_model:
        parts |= {
            "optimizer": optimizer_bytes(args, network.trained),
            "average": averaged,
            "trained weights": averaged,
            "trajectories": buffer,
        }
    else:
        parts["reference set"] = 0
    return parts


def disk_bytes(args: Any, checkpoint: int, network: Network, saves: int) -> int:
    """Most bytes that a run has on disk at once: the checkpoints it keeps, the one it writes, and the last model."""
    limit = args.save_total_limit
    if limit is not None:  # the best one stays beside the last, the new one is whole before an old one goes
        saves = min(saves, max(limit, 2 if args.load_best_model_at_end else 1) + 1)
    return saves * checkpoint + network.saved + network.adapter
