# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of one micro-batch of each phase of training, measured on the machine."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..conditions import take
from ..generation import SamplingSchedule, sample
from ..policies import decode_uint8
from ..rewards.subset_replace import SubsetReplaceReward
from .backprop import TailLoss, TailRollouts
from .estimates import Transients


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it while they live, for the CPU has no counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # what an operation takes in, or a view of it, was there before
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class Peak:
    """Bytes at most beyond those held at the start; 0 until the measurement has ended."""

    bytes = 0


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Peak]:
    """Measures the memory that what happens inside takes at most, by the device's own counter where it has one."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with AllocatedBytes() as counter:
            yield peak
        peak.bytes = counter.most


def measured(device: torch.device, action: Callable[[], Any]) -> tuple[float, int]:
    """Seconds and bytes of `action`, after a first run that is not counted."""
    action()
    with peak_bytes(device) as peak:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    if device.type != "cuda":  # where counting takes time of its own
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
    return seconds, peak.bytes


@dataclass(frozen=True)
class Measurement:
    """
    What one process measured.

    Attributes:
        transients ([`Transients`]): memory.
        evaluation (`float`): seconds of one network evaluation without gradients, per sample.
        eval_evaluation (`float`): the same in batches of evaluation.
        pair (`float`): seconds of forward and backward pass, per pair of image and step, or per image.
        decoding, features (`float`): seconds to decode an image, and to take its features.
        eval_decoding, judging (`float`): seconds to decode an image in batches of evaluation, and to evaluate it in a
            batch of all processes.
        scoring (`float`): seconds to score all subsets of a process.
        fitting (`float`): seconds to take a reference set.
        optimizer (`float`): seconds of the optimizer's step.
        adaptive_evaluations (`float`): network evaluations of the adaptive solver, per image.
        micro_batch (`int`): pairs that were measured: fewer than asked for where those did not fit.
    """

    transients: Transients
    evaluation: float
    eval_evaluation: float
    pair: float
    decoding: float
    features: float
    eval_decoding: float
    judging: float
    scoring: float
    fitting: float
    optimizer: float
    adaptive_evaluations: float
    micro_batch: int


# ---- measuring ----


class _Measured(Exception):
    """Ends training once its first step has measured."""


def measure(trainer: Any) -> Measurement:
    """
    Measures a micro-batch of each phase on the machine, in place of the first training step.

    The network is then wrapped, moved and shared out as it trains. The trainer cannot be used afterwards.

    Args:
        trainer ([`DistributionRewardTrainer`]): set up to train.
    """
    found: list[Measurement] = []

    def first_step(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        found.append(_measure_micro_batch(trainer, model))
        raise _Measured

    trainer.training_step = first_step
    evaluates_first, trainer.args.eval_on_start = trainer.args.eval_on_start, False
    try:
        trainer.train()
    except _Measured:
        return found[0]
    finally:
        trainer.args.eval_on_start = evaluates_first
    raise RuntimeError("training ended before its first step: there is nothing to measure, set max_steps.")


def _measure_micro_batch(trainer: Any, model: nn.Module) -> Measurement:
    args, device = trainer.args, trainer.accelerator.device
    update, update_bytes, size = _measured_batch(
        trainer, partial(_update, trainer, model), args.per_device_train_batch_size
    )
    started = time.perf_counter()
    trainer.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    stepping = time.perf_counter() - started
    trainer.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        return _measure_generation(trainer, model, update / size, update_bytes, stepping, size)


def _measured_batch(trainer: Any, action_of: Callable[[int], Callable[[], Any]], size: int) -> tuple[float, int, int]:
    """
    Seconds of `action_of(size)`, or of half as many as often as they do not fit; the bytes that all of `size` take;
    how many were measured.
    """
    measured_size = size
    while True:
        try:
            seconds, peak = measured(trainer.accelerator.device, action_of(measured_size))
            return seconds, peak * size // measured_size, measured_size  # nearly all of it grows with the batch
        except torch.OutOfMemoryError:
            if measured_size == 1:
                raise
            trainer.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            measured_size //= 2


def _measure_generation(
    trainer: Any, model: nn.Module, pair: float, update_bytes: int, stepping: float, size: int
) -> Measurement:
    args, device = trainer.args, trainer.accelerator.device
    rollout_size = args.rollout_batch_size or args.per_device_train_batch_size
    model.train()
    schedule = _short(args.rollout_schedule)
    rollout, rollout_bytes = measured(device, _sampling(trainer, model, rollout_size, schedule))
    model.eval()
    eval_size = args.per_device_eval_batch_size
    evaluation, eval_bytes = measured(device, _sampling(trainer, model, eval_size, schedule))

    x, conditions = start_noise(trainer, rollout_size)
    decoding, decoding_bytes, images = _measure_decoding(trainer, x)
    features, feature_bytes = measured(device, lambda: _judge(trainer, images, conditions))
    scoring, fitting, reward_bytes, reference_bytes = _measure_reward(trainer, images, conditions)
    del x, images

    x, conditions = start_noise(trainer, eval_size)
    eval_decoding, eval_decoding_bytes, images = _measure_decoding(trainer, x)
    together = eval_size * trainer.accelerator.num_processes  # every process evaluates the images of all
    judging, judging_bytes, judged = _measured_batch(
        trainer, partial(_evaluation_of, trainer, images, conditions), together
    )
    return Measurement(
        Transients(
            rollout=rollout_bytes,
            decoding=decoding_bytes,
            features=feature_bytes,
            update=update_bytes,
            evaluation=eval_bytes,
            eval_decoding=x.nbytes + eval_decoding_bytes,
            judging=x.nbytes + images.nbytes + judging_bytes,
            reward=reward_bytes,
            reference=reference_bytes,
        ),
        evaluation=rollout / schedule.num_steps / rollout_size / guidance_factor(trainer),
        eval_evaluation=evaluation / schedule.num_steps / eval_size / guidance_factor(trainer),
        pair=pair,
        decoding=decoding / rollout_size,
        features=features / rollout_size,
        eval_decoding=eval_decoding / eval_size,
        judging=judging / judged,
        scoring=scoring,
        fitting=fitting,
        optimizer=stepping,
        adaptive_evaluations=_count_adaptive(trainer, model),
        micro_batch=size,
    )


def _measure_decoding(trainer: Any, x: Tensor) -> tuple[float, int, Tensor]:
    """Seconds and bytes of decoding samples, slice by slice if need be, and their images."""
    decode = partial(decode_uint8, trainer.policy, x, trainer.args.decode_batch_size)
    return *measured(x.device, decode), decode()[0]


def guidance_factor(trainer: Any) -> int:
    """Samples through the network per velocity; one where the network takes the guidance as an input."""
    policy = trainer.policy
    return 2 if getattr(policy, "guided", getattr(policy, "guidance_scale", 1.0) != 1.0) else 1


def _short(schedule: SamplingSchedule, steps: int = 3) -> SamplingSchedule:
    return replace(schedule, num_steps=min(steps, schedule.num_steps), last_step_size=None, sde_steps=None)


def start_noise(trainer: Any, size: int) -> tuple[Tensor, Any]:
    conditions = take(trainer.conditions, [i % len(trainer.conditions) for i in range(size)])
    return trainer.policy.noise(conditions).to(trainer.accelerator.device), conditions


def _sampling(trainer: Any, model: nn.Module, size: int, schedule: SamplingSchedule) -> Callable[[], Any]:
    _, conditions = start_noise(trainer, size)

    def action() -> Any:
        with trainer.autocast():
            return sample(trainer.policy, model, conditions, schedule)

    return action


def _update(trainer: Any, model: nn.Module, size: int) -> Callable[[], None]:
    """Forward and backward pass of one micro-batch of noise; gradients stay, as they do between micro-batches."""
    args, accelerator = trainer.args, trainer.accelerator
    x, conditions = start_noise(trainer, size)
    cond = trainer.policy.encode(conditions)
    if args.loss_type == "backprop":
        loss_of = _backprop_loss(trainer, model, x, conditions, cond)
    else:
        times = args.rollout_schedule.times
        first = args.rollout_schedule.trainable_steps[0]

        def full(value: float) -> Tensor:
            return torch.full((size,), value, dtype=torch.float64, device=x.device)

        micro = {
            "cond": cond,
            "x": x,
            "next_x": x.clone(),
            "t": full(times[first]),
            "t_next": full(times[first + 1]),
            "advantages": torch.ones(size, device=x.device),
            "weights": torch.full((size,), 1 / size, device=x.device),
            "drawn_log_probs": torch.zeros(size, device=x.device),
        }
        loss_of = partial(trainer.compute_loss, model, micro)

    def action() -> None:
        trainer.hold_gradients()
        # what sends gradients to other processes is not timed: it happens once an update
        with nullcontext() if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else accelerator.no_sync(model):
            accelerator.backward(loss_of())

    return action


def _backprop_loss(trainer: Any, model: nn.Module, x: Tensor, conditions: Any, cond: Any) -> Callable[[], Tensor]:
    """Loss through as many last steps as the recipe has, the most where they are drawn."""
    args, rows = trainer.args, torch.arange(len(x), device=x.device)
    assert isinstance(trainer.rollouts, TailRollouts)
    last = len(args.rollout_schedule.times) - 1
    first = 0 if args.backprop_steps == "random" else last - int(args.backprop_steps)
    images, _ = decode_uint8(trainer.policy, x, trainer.args.decode_batch_size)
    with torch.no_grad():
        spaces = [reward.extract(images, conditions, check_finite=False) for reward in trainer.distribution_rewards]
    gradients = [{name: torch.ones_like(values) for name, values in space.items()} for space in spaces]
    rewards = list(zip(trainer.reward_names, trainer.reward_funcs, trainer.reward_weights, strict=True))
    objective = TailLoss(trainer.policy, args, trainer.rollouts, rewards)
    batch = (rows, cond, conditions, dict.fromkeys(range(first, last + 1), x))
    velocity = partial(trainer._velocity, model)
    return lambda: objective(velocity, trainer._initial_velocity, batch, gradients, rows, first, 0, trainer.state)[0]


def _judge(trainer: Any, images: Tensor, conditions: Any) -> None:
    """Features for every distribution reward, a slice of images at a time, and the scores of every other."""
    slots = torch.arange(len(images), device=images.device)
    for rows in torch.arange(len(images)).split(trainer.rollouts.judge.batch_size or len(images)):
        for reward in trainer.distribution_rewards:
            reward.extract(images[rows[0] : rows[-1] + 1], take(conditions, rows), check_finite=False)
    for function in trainer.reward_funcs:
        if not isinstance(function, SubsetReplaceReward):
            function(images=images, conditions=conditions, slots=slots[None], trainer_state=trainer.state)


def _evaluation_of(trainer: Any, images: Tensor, conditions: Any, count: int) -> Callable[[], None]:
    """All metrics of `count` images like those given, which are gathered first if they are more."""
    rows = [i % len(images) for i in range(count)]
    labels = take(conditions, rows)

    def action() -> None:
        gathered = images[:count] if count <= len(images) else images[rows]
        for metric in trainer.eval_metrics.values():
            metric.update(gathered, labels)
        for metric in trainer.eval_metrics.values():
            metric.reset()

    return action


def _measure_reward(trainer: Any, images: Tensor, conditions: Any) -> tuple[float, float, int, int]:
    """Seconds to score and to fit, bytes of scoring and of the reference set, with features like those of `images`."""
    args, device = trainer.args, trainer.accelerator.device
    processes = trainer.accelerator.num_processes
    together = args.loss_type == "backprop"
    if together:
        slots = torch.randperm(args.reference_set_size)[: args.num_subsets * args.replace_size]
    else:
        slots = trainer._draw_slots()
    slots = slots.to(device)
    mine = slots if together else slots[: max(1, len(slots) // processes)]
    seconds, sizes = {"score": 0.0, "fit": 0.0}, {"score": 0, "fit": 0}
    for reward in trainer.distribution_rewards:
        moments = {
            space: (values.mean(dim=0), values.std(dim=0, correction=0) + 1e-3)
            for space, values in reward.extract(images, conditions).items()
        }

        def drawn(count: int, moments: dict = moments) -> dict[str, Tensor]:
            return {s: m + std * torch.randn(count, len(m), device=device) for s, (m, std) in moments.items()}

        reference, new = drawn(args.reference_set_size), drawn(mine.numel())
        with peak_bytes(device) as peak:
            reward.set_reference(reference)
        sizes["fit"] += peak.bytes
        seconds["fit"] += measured(device, partial(reward.set_reference, reference))[0]
        score = partial(reward.gradient, mine, new) if together else partial(reward.score, mine, new)
        clock, size = measured(device, score)
        seconds["score"] += clock
        sizes["score"] = max(sizes["score"], size)
    return seconds["score"], seconds["fit"], sizes["score"], sizes["fit"]


def _count_adaptive(trainer: Any, model: nn.Module) -> float:
    """Network evaluations per image of the evaluated ODE, where its solver decides on them."""
    schedules = [s for s in trainer.args.eval_schedules.values() if s.num_evaluations is None]
    if not schedules:
        return 0.0
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        _sampling(trainer, model, min(4, trainer.args.per_device_eval_batch_size), schedules[0])()
    finally:
        handle.remove()
    return float(len(calls))
