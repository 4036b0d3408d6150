# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Time grids, the stochastic step with its log-probability, and ODE solvers, on the rectified-flow path.

The path is `x_t = (1 - t) x_0 + t x_1`, with data at `t = 0`, noise at `t = 1` and velocity `v = x_1 - x_0` (Eq. 1-2
of [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)). Grids run from 1 down to 0. This module knows no
model: a velocity is any callable `velocity(x, t)`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

NOISE_SCHEDULES = ("sit", "flow_grpo", "dance", "cps")
ODE_SOLVERS = ("euler", "heun", "heun_sigma", "dopri5")

Velocity = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Transition:
    """
    One step of the sampler: a Gaussian `N(mean, std² I)`, and a sample of it at `t_next`, in the dtype of `x`, with
    its log-density, averaged over the latent dimensions; 0 if `std` is. The others are float32, or float64 if `x` is.
    """

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor


@dataclass
class Trajectory:
    """Final samples `(B, ...)`; kept steps, states by grid index, and log-probabilities `(B, len(steps))`."""

    sample: Tensor
    steps: tuple[int, ...]
    states: dict[int, Tensor]
    log_probs: Tensor


def time_grid(num_steps: int, *, shift: float = 1.0, last_step_size: float | None = None) -> list[float]:
    """
    Even times from 1 (noise) to 0 (data), one more than steps, after the resolution shift `t -> shift t / (1 + (shift
    - 1) t)` (SD3, arXiv 2403.03206, Eq. 23). `last_step_size`, by default that of the others, is the size of the last
    step before the shift; SiT's SDE sampler uses 0.04.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    if shift <= 0:
        raise ValueError(f"time_shift={shift} must be positive; 1.0 leaves the grid even.")
    if last_step_size is None:
        even = [1 - i / num_steps for i in range(num_steps)] + [0.0]
    elif not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size={last_step_size} must lie strictly between 0 and 1, or be None.")
    elif num_steps == 1:
        raise ValueError("last_step_size needs at least 2 steps: raise num_inference_steps or set last_step_size=0.")
    else:
        rest = 1 - last_step_size
        even = [1 - rest * i / (num_steps - 1) for i in range(num_steps - 1)] + [last_step_size, 0.0]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def karras_grid(num_steps: int) -> list[float]:
    """
    EDM's noise levels σ from 80 to 0.002, evenly in `σ^(1/7)` (arXiv 2206.00364, Eq. 5), as times `t = σ / (1 + σ)`,
    followed by 0. EDM's sample `z = x_0 + σ ε` is `x_t = z / (1 + σ)` on this path.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: EDM's grid needs at least 2 steps.")
    first, last = 80.0 ** (1 / 7.0), 0.002 ** (1 / 7.0)
    sigmas = [(first + i / (num_steps - 1) * (last - first)) ** 7.0 for i in range(num_steps)]
    return [sigma / (1 + sigma) for sigma in sigmas] + [0.0]


def times_of_rows(t: float, x: Tensor) -> Tensor:
    """Repeats a time for every row of `x`, in its dtype."""
    return torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without waiting for the work queued on a GPU: copies from pinned memory join the queue."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def gaussian_noise(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise; of a list, row `i` is generator `i`'s, so that it depends on no batch or process."""
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return send(torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype), device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: pass one per row, or a single one.")
    rows = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return send(torch.stack(rows), device)


def transition(
    x: Tensor,
    velocity: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    noise_schedule: str,
    noise_level: float,
    start: float = 0.999,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
) -> Transition:
    """
    Draws one stochastic step from `t` to `t_next`, or scores the step to `prev_sample` that was taken.

    Both run the same arithmetic, so a replayed log-probability equals the drawn one bit for bit. With step `dt =
    t_next - t < 0`, predicted noise `x̂_1 = x + (1-t) v` and diffusion `s(t)`:

        mean = x + [v + s²/(2t) x̂_1] dt        std = s sqrt(-dt)

    | `noise_schedule` | `s(t)²` | source |
    |---|---|---|
    | `"sit"` | `2 η² t` | SiT (arXiv 2401.08740), its `sigma` form; η = 1 is SiT's own |
    | `"flow_grpo"` | `η² t/(1-t)`, on the first step its value at `t_next` | Flow-GRPO (arXiv 2505.05470) |
    | `"dance"` | `η²`, last step deterministic | DanceGRPO (arXiv 2505.07818) |
    | `"cps"` | mean `(1-t') x̂_0 + t' cos(ηπ/2) x̂_1`, std `t' sin(ηπ/2)` | coefficients-preserving (arXiv 2509.05952) |

    Args:
        x, velocity (`torch.Tensor` of shape `(B, ...)`): sample at `t`, and the velocity predicted there.
        t, t_next (`float` or `torch.Tensor` of shape `(B,)` beside `x`): times with `0 <= t_next < t <= 1`.
        noise_level (`float`): η, at least 0; at most 1 for `"cps"`. 0 is exactly the ODE's Euler step.
        start (`float`, *optional*, defaults to 0.999): first time of the grid; marks the first step of `"flow_grpo"`.
        prev_sample (`torch.Tensor` of shape `(B, ...)`, *optional*): sample at `t_next` to score.
        generator (`torch.Generator` or list of them, one per row, *optional*): source of the noise.
    """
    check_noise(noise_schedule, noise_level)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state, v = x.to(dtype), velocity.to(dtype)
    zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    t, t_next = zeros + t, zeros + t_next  # in float32, dt would not match the ODE solver's steps
    std, coefficient = _diffusion(t, t_next, noise_schedule, noise_level, start)  # (B,), (B,) float64
    std = std.to(dtype)
    wide = (len(x),) + (1,) * (x.ndim - 1)
    dt, remaining, coefficient = (c.to(dtype).view(wide) for c in (t_next - t, 1 - t, coefficient))
    mean = state + v * dt + coefficient * (state + remaining * v)

    if prev_sample is None:
        noise = gaussian_noise(x.shape, generator, x.device, dtype)
        prev_sample = (mean + std.view(wide) * noise).to(x.dtype)  # rounded to its storage dtype before it is scored
    return Transition(prev_sample, _gaussian_log_prob(prev_sample.to(dtype), mean, std), mean, std)


def _diffusion(
    t: Tensor, t_next: Tensor, noise_schedule: str, noise_level: float, start: float
) -> tuple[Tensor, Tensor]:
    """Noise std of a step, and the coefficient `c` of the predicted noise in `mean = x + v dt + c (x + (1-t) v)`."""
    step = t - t_next
    if noise_schedule == "cps":
        angle = noise_level * math.pi / 2
        return t_next * math.sin(angle), t_next * (math.cos(angle) - 1)
    if noise_schedule == "sit":
        half_rate = torch.full_like(t, noise_level**2)
        variance = 2 * noise_level**2 * t * step
    elif noise_schedule == "flow_grpo":
        # Compares with the grid's start, not with 1: on a grid from 0.9999, 1 / (1-t) would give 13 std of noise.
        bounded = torch.where(t > start - 1e-6, t_next, t)
        variance = noise_level**2 * bounded / (1 - bounded) * step
        half_rate = variance / (2 * t * step)
    else:  # dance: no later step removes the last step's noise, so the last step has none
        squared = torch.where(t_next > 0, noise_level**2, 0.0).to(t)
        variance = squared * step
        half_rate = squared / (2 * t)
    return variance.sqrt(), -half_rate * step


def _gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(sample; mean, std²), averaged over all dimensions but the first; 0 where std is 0."""  # (B,)
    stochastic = std > 0
    scale = torch.where(stochastic, std, 1.0)
    squared = (sample - mean).flatten(1).square().mean(1)
    log_prob = -squared / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(stochastic, log_prob, 0.0)


def check_noise(noise_schedule: str, noise_level: float) -> None:
    """Raises `ValueError` for an unknown noise schedule or a noise level outside its range."""
    if noise_schedule not in NOISE_SCHEDULES:
        raise ValueError(f"noise_schedule={noise_schedule!r} is unknown: choose one of {', '.join(NOISE_SCHEDULES)}.")
    if not 0 <= noise_level <= (1 if noise_schedule == "cps" else math.inf):
        raise ValueError(f"noise_level={noise_level} must be at least 0, and between 0 and 1 for 'cps'.")


def stochastic_steps(
    times: Sequence[float],
    *,
    noise_schedule: str,
    noise_level: float,
    final_step: str = "sample",
    sde_steps: Iterable[int] | None = None,
) -> tuple[int, ...]:
    """Indices of the steps with noise, among `sde_steps`: only these have a density that can be trained."""
    check_noise(noise_schedule, noise_level)
    t = torch.tensor(times, dtype=torch.float64)
    std, _ = _diffusion(t[:-1], t[1:], noise_schedule, noise_level, times[0])
    allowed = range(len(times) - 1) if sde_steps is None else set(sde_steps)
    steps = [i for i, noisy in enumerate((std > 0).tolist()) if noisy and i in allowed]
    if final_step == "mean" and steps and steps[-1] == len(times) - 2:
        steps.pop()
    return tuple(steps)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    noise_schedule: str,
    noise_level: float,
    keep_steps: Iterable[int] = (),
    keep_states: Iterable[int] = (),
    final_step: str = "sample",
    sde_steps: Iterable[int] | None = None,
    generator: Generators = None,
) -> Trajectory:
    """
    Samples along the decreasing grid `times` with [`transition`], and keeps the states that training needs.

    Args:
        velocity (`Callable`): `velocity(x, t)` with `t` of shape `(B,)`.
        x (`torch.Tensor` of shape `(B, ...)`): noise at `times[0]`.
        keep_steps (`Iterable[int]`, *optional*): steps to keep, with both their ends and their log-probabilities.
        keep_states (`Iterable[int]`, *optional*): further grid indices to keep the states of.
        final_step (`str`, *optional*, defaults to `"sample"`): `"mean"` leaves out the last step's noise, as SiT does.
        sde_steps (`Iterable[int]`, *optional*):
            steps with noise, all by default; the others are Euler steps of the ODE (MixGRPO, arXiv 2507.21802).
    """
    keep = tuple(sorted(set(keep_steps)))
    noisy = set(range(len(times) - 1) if sde_steps is None else sde_steps)
    trainable = stochastic_steps(
        times, noise_schedule=noise_schedule, noise_level=noise_level, final_step=final_step, sde_steps=noisy
    )
    if wrong := sorted(set(keep) - set(trainable)):
        raise ValueError(f"steps {wrong} have no noise and so no density: keep only steps among {trainable}.")

    ends = {i for step in keep for i in (step, step + 1)} | set(keep_states)
    states = {0: x} if 0 in ends else {}
    log_probs = []
    step_of = partial(transition, noise_schedule=noise_schedule, start=times[0])
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, times_of_rows(t, x))
        step = step_of(x, v, t, t_next, noise_level=noise_level if i in noisy else 0.0, generator=generator)
        mean_only = final_step == "mean" and i == len(times) - 2
        x = step.mean.to(x.dtype) if mean_only else step.prev_sample
        if i in keep:
            log_probs.append(step.log_prob)
        if i + 1 in ends:
            states[i + 1] = x
    kept = torch.stack(log_probs, dim=1) if log_probs else x.new_zeros(x.shape[0], 0)
    return Trajectory(sample=x, steps=keep, states=states, log_probs=kept)


def replay(
    velocity: Velocity,
    states: Mapping[int, Tensor],
    times: Sequence[float],
    first: int,
    *,
    noise_schedule: str,
    noise_level: float,
    sde_steps: Iterable[int] | None = None,
) -> Tensor:
    """
    Repeats the steps from grid index `first` to the end, with gradients, and returns the sample there.

    The noise of a step that was taken is its end minus its mean, a constant. So the values equal the rollout's bit for
    bit, and gradients run through the means. `states` are the rollout's samples `(B, ...)` at `first` and after; see
    [`rollout`] for the other arguments.
    """
    noisy = set(range(len(times) - 1) if sde_steps is None else sde_steps)
    step_of = partial(transition, noise_schedule=noise_schedule, start=times[0])
    x = states[first]
    for i in range(first, len(times) - 1):
        v = velocity(x, times_of_rows(times[i], x))
        level, taken = noise_level if i in noisy else 0.0, states[i + 1]
        mean = step_of(x, v, times[i], times[i + 1], noise_level=level, prev_sample=taken).mean
        x = taken + (mean - mean.detach()).to(taken.dtype)
    return x


@torch.no_grad()
def solve_ode(velocity: Velocity, x: Tensor, times: Sequence[float], *, solver: str = "euler") -> Tensor:
    """
    Integrates `dx/dt = velocity(x, t)` from `x` along the grid; arguments as in [`rollout`].

    - `"euler"`: first order, one evaluation a step.
    - `"heun"`: second order, two evaluations a step; the step onto `t = 0` is Euler's (EDM, arXiv 2206.00364,
      Algorithm 1).
    - `"heun_sigma"`: Heun's steps in the noise level `σ = t/(1-t)`, as in EDM. They differ from Heun's steps in `t`.
      The grid must start below 1, where σ is infinite.
    - `"dopri5"`: torchdiffeq's adaptive method of fifth order, the default of SiT's code, with SiT's tolerances. It
      uses only the ends of the grid, and the samples of a batch share its steps.
    """
    if solver == "dopri5":
        from torchdiffeq import odeint  # not a dependency: pip install 'trl-distreward[ode]'

        def backwards(elapsed: Tensor, x: Tensor) -> Tensor:
            return -velocity(x, (times[0] - elapsed).to(x.dtype).expand(x.shape[0]))

        ends = torch.tensor([0.0, times[0] - times[-1]], dtype=torch.float64, device=x.device)
        return odeint(backwards, x, ends, method="dopri5", rtol=1e-3, atol=1e-6)[-1]
    for t, t_next in pairwise(times):
        v = velocity(x, times_of_rows(t, x))
        if solver != "euler" and t_next > 0:
            euler = x + v * (t_next - t)
            v_next = velocity(euler, times_of_rows(t_next, x))
            if solver == "heun_sigma":  # the slope in σ at the step's end, written as a velocity at its start
                v_next = (euler + (1 - t_next) * v_next - x) / (1 - t)
            v = 0.5 * (v + v_next)
        x = x + v * (t_next - t)
    return x
