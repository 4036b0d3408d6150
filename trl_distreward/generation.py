# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The loop that makes images, for rollouts, reference sets, evaluation, merge candidates and the command line."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import sampling
from .conditions import Conditions, take
from .policies import DiffusionPolicy, decode_uint8
from .seeds import keyed_generator

TIME_GRIDS = ("auto", "uniform", "karras")
SOLVERS = ("auto", *sampling.ODE_SOLVERS)
LAST_STEP_SIZE = 0.04  # of SiT's own SDE sampler


@dataclass(frozen=True)
class SamplingSchedule:
    """
    Settings of the sampler. By default the policy decides where the steps are, see [`~SamplingSchedule.on`].

    Args:
        sampler (`str`, *optional*, defaults to `"sde"`): `"sde"` or `"ode"`.
        noise_schedule, noise_level: noise of the SDE, see [`~sampling.transition`].
        last_step_size (`float` or `"auto"`, *optional*, defaults to `"auto"`): ends an even SDE grid with a noiseless
            step of this size; 0 or `None`: all steps have noise. `"auto"`: 0.04, on other grids the grid's own.
        solver (`str`, *optional*, defaults to `"auto"`): of the ODE; `"auto"`: the policy's own, or Euler's method.
        time_shift (`float`, *optional*, defaults to 1.0): resolution shift of an even grid.
        sde_steps (`tuple[int, ...]`, *optional*): steps of the SDE with noise; all by default.
        time_grid (`str`, *optional*, defaults to `"auto"`): `"auto"`: the policy's own grid; even steps if it has
            none. `"uniform"`: even steps from 1 to 0. `"karras"`: EDM's noise levels.
        grid, noise_scale: the policy's own times, and scale of its starting noise; `on` fills them in.
    """

    num_steps: int
    sampler: str = "sde"
    noise_schedule: str = "sit"
    noise_level: float = 1.0
    last_step_size: float | str | None = "auto"
    solver: str = "auto"
    time_shift: float = 1.0
    sde_steps: tuple[int, ...] | None = None
    time_grid: str = "auto"
    grid: tuple[float, ...] | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("sampler", ("sde", "ode")), ("solver", SOLVERS), ("time_grid", TIME_GRIDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        sampling.check_noise(self.noise_schedule, self.noise_level)
        fixed = self.time_grid == "karras" or self.grid is not None
        ends_alone = self.sampler == "sde" and self.last_step_size not in ("auto", None, 0)
        if fixed and (self.time_shift != 1.0 or ends_alone):
            asked = f"time_shift={self.time_shift} and last_step_size={self.last_step_size}"
            raise ValueError(f"time_grid={self.time_grid!r} fixes all steps: leave out {asked}, or set 'uniform'.")

    def on(self, policy: DiffusionPolicy) -> "SamplingSchedule":
        """Replaces `"auto"` by what the policy has; raises `ValueError` if grid or solver do not suit the policy."""
        schedule = self
        if self.time_grid == "auto" and self.grid is None:
            own = getattr(policy, "grid", None)
            schedule = self._on_grid(*own(self.num_steps)) if own else replace(self, time_grid="uniform")
        is_even = schedule.time_grid == "uniform"
        if is_even and self.last_step_size == "auto":
            schedule = replace(schedule, last_step_size=LAST_STEP_SIZE)
        if self.solver == "auto":
            schedule = replace(schedule, solver="euler" if is_even else getattr(policy, "solver", "euler"))
        if self.sampler == "ode" and self.solver == "dopri5" and not getattr(policy, "velocity_at_data", True):
            name = type(policy).__name__
            raise ValueError(f"solver='dopri5' needs the velocity at t = 0, where {name} has none: choose 'heun'.")
        if self.sampler == "ode" and schedule.solver == "heun_sigma" and schedule.times[0] == 1:
            raise ValueError("solver='heun_sigma' cannot start from t = 1: set time_grid='karras'.")
        return schedule

    def _on_grid(self, times: list[float], noise_scale: float) -> "SamplingSchedule":
        if len(times) != self.num_steps + 1 or not all(a > b for a, b in pairwise(times)):
            found = f"the scheduler takes {len(times) - 1} steps for num_inference_steps={self.num_steps}"
            raise ValueError(f"{found}, or its times do not decrease: set another number, or time_grid='uniform'.")
        return replace(self, grid=tuple(times), noise_scale=noise_scale)

    @property
    def times(self) -> list[float]:
        """Decreasing times, one more than there are steps; even steps until a policy has replaced `"auto"`."""
        if self.grid is not None:
            return list(self.grid)
        if self.time_grid == "karras":
            return sampling.karras_grid(self.num_steps)
        last = LAST_STEP_SIZE if self.last_step_size == "auto" else float(self.last_step_size or 0)
        last_step_size = last if last and self.sampler == "sde" else None
        return sampling.time_grid(self.num_steps, shift=self.time_shift, last_step_size=last_step_size)

    @property
    def final_step(self) -> str:
        """`"mean"` if the SDE ends with a noiseless step, else `"sample"`."""
        return "mean" if self.last_step_size else "sample"

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps with noise, which have a density; none under the ODE."""
        if self.sampler == "ode":
            return ()
        return sampling.stochastic_steps(
            self.times,
            noise_schedule=self.noise_schedule,
            noise_level=self.noise_level,
            final_step=self.final_step,
            sde_steps=self.sde_steps,
        )

    @property
    def num_evaluations(self) -> int | None:
        """Network evaluations per image; `None` for a solver that chooses its own steps."""
        if self.sampler == "sde" or self.solver in ("auto", "euler"):
            return self.num_steps
        return None if self.solver == "dopri5" else 2 * self.num_steps - 1


def image_generators(seed: int, stream: str, step: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, seeded by the run's seed, the purpose, the step and the image's index."""
    return [keyed_generator(seed, stream, step, i) for i in indices]


@torch.no_grad()
def sample(
    policy: DiffusionPolicy,
    model: nn.Module,
    conditions: Conditions,
    schedule: SamplingSchedule,
    generator: sampling.Generators = None,
    keep_steps: Sequence[int] = (),
    keep_states: Sequence[int] = (),
) -> sampling.Trajectory:
    """Samples one batch by the network `model`; for `keep_steps` and `keep_states` see [`~sampling.rollout`]."""
    schedule = schedule.on(policy)
    if schedule.sampler == "ode" and schedule.solver != "euler" and keep_states:
        raise ValueError(f"solver={schedule.solver!r} keeps no states: set solver='euler'.")
    cond = policy.encode(conditions)
    # A grid that starts below 1 starts from t x_1, without the (1 - t) x_0 of the data.
    x = policy.noise(conditions, generator) * (schedule.noise_scale or schedule.times[0])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return policy.velocity(model, x, t, cond)

    if schedule.sampler == "ode" and not keep_states:
        final = sampling.solve_ode(velocity, x, schedule.times, solver=schedule.solver)
        return sampling.Trajectory(final, (), {}, x.new_zeros(len(x), 0))
    return sampling.rollout(
        velocity,
        x,
        schedule.times,
        noise_schedule=schedule.noise_schedule,
        noise_level=schedule.noise_level,
        keep_steps=keep_steps,
        keep_states=keep_states,
        final_step=schedule.final_step,
        sde_steps=() if schedule.sampler == "ode" else schedule.sde_steps,
        generator=generator,
    )


@dataclass
class Generated:
    """A batch of samples, with the index and the condition of each."""

    indices: list[int]
    conditions: Conditions
    trajectory: sampling.Trajectory

    @property
    def sample(self) -> Tensor:
        return self.trajectory.sample


def generate(
    policy: DiffusionPolicy,
    conditions: Conditions,
    schedule: SamplingSchedule,
    *,
    seed: int = 0,
    stream: str = "images",
    step: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    model: nn.Module | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    keep_steps: Sequence[int] = (),
    keep_states: Sequence[int] = (),
) -> Iterator[Generated]:
    """
    Generates one sample per condition. It depends on `seed`, `stream`, `step` and its index alone, which key its noise
    (see [`image_generators`]): not on the batch size, the process or the device.

    Args:
        indices (`Sequence[int]`, *optional*): index of each image; 0, 1, … by default.
        batch_size (`int`, *optional*, defaults to 64): images at a time.
        model (`torch.nn.Module`, *optional*): network to use in place of the policy's own.
        autocast (`Callable`, *optional*): makes the context that the network runs in; decoding stays outside of it.
        policy, conditions, schedule, keep_steps, keep_states: see [`sample`].
    """
    schedule, network = schedule.on(policy), policy.model if model is None else model
    numbers = range(len(conditions)) if indices is None else indices
    if len(numbers) != len(conditions):
        raise ValueError(f"{len(numbers)} indices for {len(conditions)} conditions: give one of each per image.")
    for start in range(0, len(numbers), batch_size):
        chunk = list(numbers[start : start + batch_size])
        batch = take(conditions, range(start, start + len(chunk)))
        generators = image_generators(seed, stream, step, chunk)
        with autocast():
            trajectory = sample(policy, network, batch, schedule, generators, keep_steps, keep_states)
        yield Generated(chunk, batch, trajectory)


def generate_images(
    policy: DiffusionPolicy,
    conditions: Conditions,
    schedule: SamplingSchedule,
    *,
    decode_batch_size: int | None = None,
    **options: Any,
) -> Iterator[tuple[Tensor, Conditions]]:
    """Yields uint8 images `(B, C, H, W)`, one per condition, with the conditions; for `options` see [`generate`]."""
    with evaluating(policy.model):
        for batch in generate(policy, conditions, schedule, **options):
            images, finite = decode_uint8(policy, batch.sample, decode_batch_size)
            if not finite.all():
                index = batch.indices[int((~finite).nonzero()[0])]
                raise ValueError(f"image {index} is not finite: the model has diverged, or needs higher precision.")
            yield images, batch.conditions


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Switches dropout off, label dropout included, and restores every module's mode at the end."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield network.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def share_out(count: int, batch_size: int, rank: int, processes: int) -> tuple[list[int], list[int]]:
    """Deals images to processes in equal numbers: this process's indices, and how many of each batch count."""
    own, valid = [], []
    for start in range(0, count, batch_size * processes):
        valid.append(min(batch_size * processes, count - start))
        share = math.ceil(valid[-1] / processes)
        own += [min(i, count - 1) for i in range(start + rank * share, start + (rank + 1) * share)]
    return own, valid
