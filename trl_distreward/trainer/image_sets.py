# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sets of images that all processes generate together: reference sets and evaluations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..conditions import take
from ..generation import SamplingSchedule, evaluating, generate, share_out
from ..policies import decode_uint8

if TYPE_CHECKING:
    from .base import DiffusionTrainer


def shared_images(
    trainer: "DiffusionTrainer",
    model: nn.Module,
    conditions: Any,
    schedule: SamplingSchedule,
    noise: tuple[int, str, int],
    name: str,
) -> Iterator[tuple[Tensor, Any, int, Tensor]]:
    """
    Generates one image per condition, a share on each process, with a progress bar called `name`. `noise` is the
    seed, stream and step of [`~generation.generate`].

    Yields:
        this process's uint8 images and their conditions, how many rows of the gathered images count, and a mask of
        finite images.
    """
    args, accelerator = trainer.args, trainer.accelerator
    size, total = args.per_device_eval_batch_size, len(conditions)
    own, valid = share_out(total, size, accelerator.process_index, accelerator.num_processes)
    seed, stream, step = noise
    batches = generate(
        trainer.policy,
        take(conditions, own),
        schedule,
        seed=seed,
        stream=stream,
        step=step,
        indices=own,
        batch_size=size,
        model=model,
        autocast=trainer.autocast,
    )
    hidden = args.disable_tqdm or not accelerator.is_main_process
    with tqdm(total=total, desc=name, unit="image", leave=False, disable=hidden) as bar:
        for batch, count in zip(batches, valid, strict=True):
            images, finite = decode_uint8(trainer.policy, batch.sample, args.decode_batch_size)
            yield images, batch.conditions, count, finite
            bar.update(count)


def evaluate_images(
    trainer: "DiffusionTrainer", model: nn.Module, conditions: Any, schedule: SamplingSchedule, seed: int, name: str
) -> dict[str, float]:
    """Computes the trainer's metrics of images from noise of `seed`; every process has the images of all."""
    accelerator, metrics = trainer.accelerator, trainer.eval_metrics
    for metric in metrics.values():
        metric.reset()
    for images, labels, valid, finite in shared_images(
        trainer, model, conditions, schedule, (seed, "evaluation", 0), name
    ):
        if not bool(accelerator.gather(finite).all()):
            raise ValueError(f"{name}: generated samples are not finite; the model has diverged.")
        if isinstance(labels, Tensor):
            everyone = accelerator.gather(labels.to(accelerator.device))
        else:
            everyone = gather_object(labels)
        gathered = accelerator.gather(images)[:valid]
        for metric in metrics.values():
            metric.update(gathered, everyone[:valid])
    values = {key: float(metric.compute()) for key, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()  # frees the features
    return values


def evaluate_samplers(trainer: "DiffusionTrainer", conditions: Any, seed: int) -> dict[str, float]:
    """Computes `{sampler}_{metric}` under every evaluated schedule, from noise of `seed`."""
    schedules = trainer.args.eval_schedules
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and trainer.model is trainer.model_wrapped:
        trainer.model.to(trainer.accelerator.device)  # before training they leave it where it was loaded
    trainer.run_record.images["evaluation"] += len(conditions) * len(schedules)
    values: dict[str, float] = {}
    with (
        evaluating(trainer.sampled_model) as model,
        trainer.run_record.timed("evaluation"),
        trainer.evaluation_weights(),
    ):
        for sampler, schedule in schedules.items():
            found = evaluate_images(trainer, model, conditions, schedule, seed, f"Evaluation, {sampler}")
            values |= {f"{sampler}_{name}": value for name, value in found.items()}
    return values
