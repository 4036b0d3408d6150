# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images from a policy: which steps are taken, and which noise each image gets."""

import hashlib
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from .strata import column_of, members_of, proportional_counts


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


def take(conditions: Any, indices: Tensor | Sequence[int]) -> Any:
    """Rows of conditions held as a tensor or as a list."""
    if isinstance(conditions, Tensor):
        return conditions[torch.as_tensor(indices, device=conditions.device)]
    return [conditions[int(i)] for i in indices]


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


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """
    Labels `0, 1, …, num_classes - 1` repeated to `count`; of the last, incomplete round so many at even distances, as
    neighbouring classes are alike in ImageNet. Class frequencies differ by at most one.
    """
    rounds, rest = divmod(count, num_classes)
    last = torch.arange(rest) * num_classes // max(rest, 1)
    return torch.cat([torch.arange(num_classes).repeat(rounds), last])


def rows_of_slots(num_rows: int, count: int, seed: int, strata: Sequence[Hashable] | None = None) -> Tensor:
    """
    The dataset's row of each of `count` slots: all rows in shuffled rounds; of the last, incomplete round so many of
    each stratum as are in proportion, where rows have strata.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(num_rows, generator=generator) for _ in range(math.ceil(count / num_rows))]
    rest = count % num_rows
    if strata is not None and rest:
        members = members_of(strata)
        counts = proportional_counts(torch.tensor([len(m) for m in members]), rest, generator).tolist()
        place = torch.empty(num_rows, dtype=torch.long).scatter_(0, rounds[-1], torch.arange(num_rows))
        # the first of each stratum in the shuffled order
        chosen = [m[place[m].argsort()[:wanted]] for m, wanted in zip(members, counts, strict=True)]
        rounds[-1] = torch.cat(chosen)
    return torch.cat(rounds)[:count]


def strata_of_slots(dataset: Any, column: str, count: int, seed: int, conditions: Any) -> list[Hashable]:
    """The stratum of each of `count` slots, which `column` says; without a dataset the slot's class is its stratum."""
    if dataset is None:
        if column != "class_labels":
            raise ValueError(f"stratify_by={column!r} is a column of the train_dataset, which is missing: pass one.")
        return conditions.tolist()
    strata = column_of(dataset, column)
    return take(strata, rows_of_slots(len(strata), count, seed, strata))


def conditions_of_slots(
    policy: DiffusionPolicy, dataset: Any, count: int, seed: int, stratify_by: str | None = None
) -> Any:
    """
    Conditions of `count` slots: the dataset's rows in shuffled rounds, or all classes in balance.

    They are in its column `class_labels`, or `prompt` for a policy without classes. Where `stratify_by` names a column
    of strata, an incomplete round has its share of each of them.

    Raises:
        ValueError: no such column, conditions the model does not know, or a policy without classes and no dataset.
    """
    if dataset is None:
        if policy.num_conditions is None:
            raise ValueError("this policy has no classes to balance: pass a train_dataset with a column of prompts.")
        return balanced_labels(count, policy.num_conditions)
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    column = "prompt" if policy.num_conditions is None else "class_labels"
    if column not in columns:
        raise ValueError(f"the dataset has columns {columns}: conditions must be in a column {column!r}.")
    rows = column_of(dataset, column)
    conditions = rows if policy.num_conditions is None else torch.as_tensor(rows)
    policy.check_conditions(conditions)
    strata = None if stratify_by is None else column_of(dataset, stratify_by)
    return take(conditions, rows_of_slots(len(rows), count, seed, strata))
