# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sets of images that all processes generate together: reference sets, evaluations and samples."""

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..conditions import Conditions, take
from ..generation import Generated, SamplingSchedule, evaluating, generate, image_generators, share_out
from ..policies import decode_slices, decode_uint8
from .reward_functions import joined
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from .base import DiffusionTrainer

ImageBatch = tuple[Tensor, Conditions, int, Tensor]  # images, conditions, how many count, mask of finite ones


def generate_for(
    trainer: "DiffusionTrainer",
    model: nn.Module,
    conditions: Conditions,
    schedule: SamplingSchedule,
    noise: tuple[int, str, int],
    **options: Any,
) -> Iterator[Generated]:
    """Calls [`~generation.generate`] for a trainer; `noise` is the seed, stream and step."""
    seed, stream, step = noise
    options |= {"seed": seed, "stream": stream, "step": step, "model": model, "autocast": trainer.autocast}
    return generate(trainer.policy, conditions, schedule, **options)


def shared_images(
    trainer: "DiffusionTrainer",
    model: nn.Module,
    conditions: Conditions,
    schedule: SamplingSchedule,
    noise: tuple[int, str, int],
    name: str,
) -> Iterator[ImageBatch]:
    """Yields uint8 images, one per condition, with conditions, how many rows count, and a mask of finite ones."""
    args, accelerator = trainer.args, trainer.accelerator
    size, total = trainer.eval_batch_size, len(conditions)
    own, valid = share_out(total, size, accelerator.process_index, accelerator.num_processes)
    batches = generate_for(trainer, model, take(conditions, own), schedule, noise, indices=own, batch_size=size)
    with progress_bar(trainer, total, name, "image") as bar:
        for batch, count in zip(batches, valid, strict=True):
            images, finite = decode_uint8(trainer.policy, batch.sample, args.decode_batch_size)
            yield images, batch.conditions, count, finite
            bar.update(count)
            stop_if_asked(trainer)


def progress_bar(trainer: "DiffusionTrainer", total: int, name: str, unit: str) -> tqdm:
    """A bar that goes when it is done, on the main process unless `disable_tqdm` is set."""
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=hidden)


def fitting_batch_size(trainer: "DiffusionTrainer") -> int:
    """Finds how many images fit on the device at a time, the same on every process: 64, halved on a GPU as needed."""
    size = 64
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return trainer.args.per_device_train_batch_size  # a process out of memory would leave the others waiting
    while trainer.accelerator.device.type == "cuda" and size > 1 and not fits(trainer, size):
        size //= 2
        torch.cuda.empty_cache()
    return min(gather_object([size]))


@torch.no_grad()
def fits(trainer: "DiffusionTrainer", size: int) -> bool:
    """Whether `size` images of noise pass the network, the decoder and the rewards' extractors."""
    policy, device, indices = trainer.policy, trainer.accelerator.device, range(size)
    trained = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    conditions = take(trainer.conditions, [i % len(trainer.conditions) for i in indices])
    try:
        later = torch.empty(3 * trained, device=device)  # room for the gradients and the optimizer's two moments
        x = policy.noise(conditions, image_generators(0, "trial", 0, indices)).to(device)
        t = torch.full((size,), trainer.args.rollout_schedule.times[0], device=device)
        with trainer.autocast():
            policy.velocity(trainer.unwrapped(trainer.sampled_model), x, t, policy.encode(conditions))
        decode_and_extract(trainer, x, conditions)
        del later
    except torch.OutOfMemoryError:
        return False
    return True


def evaluate_samplers(trainer: "DiffusionTrainer", sets: dict[str, Conditions], seed: int) -> dict[str, float]:
    """Computes the metrics `{prefix}{sampler}_{metric}` of `sets` of conditions by prefix, from noise of `seed`."""
    schedules, device, gather = trainer.args.eval_schedules, trainer.accelerator.device, trainer.accelerator.gather
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and trainer.model is trainer.model_wrapped:
        trainer.model.to(device)  # before training they leave it where it was loaded
    values: dict[str, float] = {}
    record = trainer.run_record
    record.images["evaluation"] += sum(map(len, sets.values())) * len(schedules)
    with evaluating(trainer.sampled_model) as model, record.timed("evaluation"), trainer.evaluation_weights():
        for (prefix, conditions), (sampler, schedule) in product(sets.items(), schedules.items()):
            name = f"Evaluation, {prefix}{sampler}"
            for metric in trainer.eval_metrics.values():
                metric.reset()
            batches = shared_images(trainer, model, conditions, schedule, (seed, "evaluation", 0), name)
            for images, labels, valid, finite in batches:
                if not bool(gather(finite).all()):
                    raise ValueError(f"{name}: generated samples are not finite; the model has diverged.")
                everyone = gather(labels.to(device)) if isinstance(labels, Tensor) else gather_object(labels)
                gathered = gather(images)[:valid]
                for metric in trainer.eval_metrics.values():
                    metric.update(gathered, everyone[:valid])
            for key, metric in trainer.eval_metrics.items():
                values[f"{prefix}{sampler}_{key}"] = float(metric.compute())
                metric.reset()  # frees the features
    return values


@torch.no_grad()
def decode_and_extract(
    trainer: "DiffusionTrainer", x: Tensor, conditions: Conditions
) -> tuple[list[dict[str, Tensor]], Tensor, Tensor | None]:
    """Decodes and extracts part by part: features, a mask of finite images, and images if a function sees them."""
    rewards, start = trainer.rewards, 0
    features, finite, images = [], [], []
    for part, decoded in decode_slices(trainer.policy, x, trainer.args.decode_batch_size):
        labels = take(conditions, range(start, start + len(part)))
        start += len(part)
        features.append([reward.extract(part, labels, check_finite=False) for reward in rewards.of_sets])
        for values in (rows for spaces in features[-1] for rows in spaces.values()):
            decoded = decoded & values.isfinite().all(dim=1)
        finite.append(decoded)
        images.append(part)
    return joined(torch.cat, features), torch.cat(finite), torch.cat(images) if rewards.single else None
