# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images from a policy: which steps are taken, and which noise each image gets."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .conditions import take
from .policies import DiffusionPolicy, decode_uint8
from .sampling import (
    ENDS_AT_DATA,
    NOISE_SCHEDULES,
    ODE_SOLVERS,
    TIME_GRIDS,
    Generators,
    Trajectory,
    karras_grid,
    rollout,
    solve_ode,
    stochastic_steps,
    time_grid,
)


@dataclass(frozen=True)
class SamplingSchedule:
    """
    How a policy is sampled.

    Args:
        num_steps (`int`): steps of the grid.
        sampler (`str`, *optional*, defaults to `"sde"`): `"sde"` or `"ode"`.
        noise_schedule, noise_level: of the SDE, as in [`~sampling.transition`].
        last_step_size (`float`, *optional*): the SDE then ends with a noiseless step of this size, as SiT's does.
        solver (`str`, *optional*, defaults to `"euler"`): of the ODE, as in [`~sampling.solve_ode`].
        time_grid (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` from 1 to 0; `"karras"`, EDM's noise levels from 80 to 0.002 as times; or `"scheduler"`, that
            of the policy's pipeline, see [`SamplingSchedule.on`].
        time_shift (`float`, *optional*, defaults to 1.0): resolution shift of the grid.
        sde_steps (`tuple[int, ...]`, *optional*): the SDE's steps with noise; all by default.
        grid (`tuple[float, ...]`, *optional*): the policy's times, once they are known.
        noise_scale (`float`, *optional*): of the starting noise; the first time by default.
    """

    num_steps: int
    sampler: str = "sde"
    noise_schedule: str = "sit"
    noise_level: float = 1.0
    last_step_size: float | None = None
    solver: str = "euler"
    time_shift: float = 1.0
    sde_steps: tuple[int, ...] | None = None
    time_grid: str = "uniform"
    grid: tuple[float, ...] | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("sampler", ("sde", "ode")), ("solver", ODE_SOLVERS), ("time_grid", TIME_GRIDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        if self.noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"noise_schedule={self.noise_schedule!r} is unknown: choose one of {', '.join(NOISE_SCHEDULES)}."
            )
        if self.time_grid != "uniform" and (self.time_shift != 1.0 or self._last_step_size is not None):
            raise ValueError(
                f"time_grid={self.time_grid!r} fixes all steps, but time_shift={self.time_shift} and last_step_size="
                f"{self.last_step_size}: set time_shift=1.0 and last_step_size=None."
            )
        if self.time_grid == "uniform" and self.solver == "heun_sigma" and self.sampler == "ode":
            raise ValueError("solver='heun_sigma' has no first step from t = 1: set time_grid='karras'.")

    def on(self, policy: DiffusionPolicy) -> "SamplingSchedule":
        """
        The schedule with the times of `policy` where `time_grid="scheduler"`, else as it is.

        Raises:
            ValueError: the policy has no times of its own, or another number of them, or none of the velocities at
                `t = 0` that the solver asks for.
        """
        if self.sampler == "ode" and self.solver in ENDS_AT_DATA and not getattr(policy, "velocity_at_data", True):
            raise ValueError(
                f"solver={self.solver!r} asks for the velocity at t = 0, which {type(policy).__name__} has not: "
                f"choose {', '.join(name for name in ODE_SOLVERS if name not in ENDS_AT_DATA)}."
            )
        if self.time_grid != "scheduler":
            return self
        if not hasattr(policy, "grid"):
            raise ValueError(
                f"{type(policy).__name__} has no grid(num_steps) of its own: set another time_grid, or give it one."
            )
        times, noise_scale = policy.grid(self.num_steps)
        if len(times) != self.num_steps + 1:
            raise ValueError(
                f"the scheduler takes {len(times) - 1} steps for num_steps={self.num_steps}: ask for another number, "
                "or set time_grid='uniform'."
            )
        return replace(self, grid=tuple(times), noise_scale=noise_scale)

    @property
    def _last_step_size(self) -> float | None:
        return self.last_step_size if self.sampler == "sde" else None

    @property
    def times(self) -> list[float]:
        if self.time_grid == "scheduler":
            if self.grid is None:
                raise ValueError("the times of time_grid='scheduler' are the policy's: use schedule.on(policy).")
            return list(self.grid)
        if self.time_grid == "karras":
            return karras_grid(self.num_steps)
        return time_grid(self.num_steps, shift=self.time_shift, last_step_size=self._last_step_size)

    @property
    def final_step(self) -> str:
        return "sample" if self.last_step_size is None else "mean"

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """Steps that have a density; none under the ODE."""
        if self.sampler == "ode":
            return ()
        return stochastic_steps(
            self.times,
            noise_schedule=self.noise_schedule,
            noise_level=self.noise_level,
            final_step=self.final_step,
            sde_steps=self.sde_steps,
        )

    @property
    def num_evaluations(self) -> int | None:
        """Network evaluations per image; `None` where the solver decides."""
        solver = self.solver if self.sampler == "ode" else "euler"
        if solver == "dopri5":
            return None
        return {"euler": self.num_steps, "heun2": 2 * self.num_steps}.get(solver, 2 * self.num_steps - 1)


def image_generators(seed: int, stream: str, step: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, fixed by the run's seed, what the images are for, the step and the image's index.

    An image is then the same whichever process, device or micro-batch makes it. Indices below 2³² never collide.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=4).digest()
    base = int.from_bytes(digest, "big")  # CPU generators use 32 bits of their seed
    return [torch.Generator().manual_seed((base + i) % 2**32) for i in indices]


def sample(
    policy: DiffusionPolicy,
    model: nn.Module,
    conditions: Any,
    schedule: SamplingSchedule,
    generator: Generators = None,
    keep_steps: Sequence[int] = (),
    keep_states: Sequence[int] = (),
) -> Trajectory:
    """
    A batch of samples `(B, ...)` for `conditions`.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        model (`torch.nn.Module`): its network, or another in place of it.
        conditions: one per sample.
        schedule ([`SamplingSchedule`]): how.
        generator (`torch.Generator` or list of them, one per sample, *optional*): source of the noise.
        keep_steps (`Sequence[int]`, *optional*): steps of an SDE to keep, with their densities.
        keep_states (`Sequence[int]`, *optional*): grid indices whose states to keep, of an SDE or Euler's ODE.
    """
    schedule = schedule.on(policy)
    if schedule.sampler == "ode" and schedule.solver != "euler" and keep_states:
        raise ValueError(f"solver={schedule.solver!r} keeps no states between: set solver='euler'.")
    with torch.no_grad():
        cond = policy.encode(conditions)
        # a grid that starts below 1 starts from t x_1, without data's (1 - t) x_0, or as the pipeline's own does
        x = policy.noise(conditions, generator) * (schedule.noise_scale or schedule.times[0])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return policy.velocity(model, x, t, cond)

    if schedule.sampler == "ode" and not keep_states:
        times = schedule.times
        final = solve_ode(velocity, x, times, solver=schedule.solver)
        return Trajectory(final, times, (), {}, x.new_zeros(len(x), 0))
    return rollout(
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


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network without dropout, of labels too; each module is then as it was."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield network.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def generate_images(
    policy: DiffusionPolicy,
    conditions: Any,
    schedule: SamplingSchedule,
    *,
    seed: int = 0,
    batch_size: int = 64,
    model: nn.Module | None = None,
    stream: str = "images",
    indices: range | None = None,
    decode_batch_size: int | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """
    Generates one image per condition.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        conditions: one per image, a tensor or a list.
        schedule ([`SamplingSchedule`]): how to sample.
        seed (`int`, *optional*, defaults to 0): image `i` depends on this and `i` alone, not on `batch_size`, nor on
            whether the network is in training mode.
        batch_size (`int`, *optional*, defaults to 64): images at a time.
        model (`torch.nn.Module`, *optional*): network to use in place of the policy's own.
        indices (`range`, *optional*): which of the images to generate; all by default.
        decode_batch_size (`int`, *optional*): samples decoded at a time; all of a batch by default.

    Yields:
        uint8 images `(batch, C, H, W)` and their conditions.

    Raises:
        ValueError: a sample or its image is not finite; it names the first.
    """
    wanted = range(len(conditions)) if indices is None else indices
    for start in range(0, len(wanted), batch_size):
        images = wanted[start : start + batch_size]
        batch = take(conditions, images)
        generators = image_generators(seed, stream, 0, images)
        with evaluating(model or policy.model) as network:
            x = sample(policy, network, batch, schedule, generators).sample
        decoded, finite = decode_uint8(policy, x, decode_batch_size)
        if not finite.all():
            raise ValueError(
                f"image {images[int((~finite).nonzero()[0])]} is not finite: the model has diverged, or its precision "
                "is too low, as the VAE of SDXL's is in float16."
            )
        yield decoded, batch
