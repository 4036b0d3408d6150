# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Time grids, the stochastic step with its log-probability, and deterministic solvers, on the rectified-flow path.

Everything here is written for `x_t = (1 - t) x_0 + t x_1` with data at `t = 0`, noise at `t = 1` and velocity
`v = x_1 - x_0` (Eq. 1-2 of [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)); grids run from 1 down to 0.
No model, policy or trainer is known here: a velocity is any callable `velocity(x, t)`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

NOISE_SCHEDULES = ("sit", "flow_grpo", "dance", "cps")
ODE_SOLVERS = ("euler", "heun", "heun_sigma", "heun2", "dopri5")
ENDS_AT_DATA = ("heun2", "dopri5")  # those that evaluate the velocity at t = 0 too
TIME_GRIDS = ("uniform", "karras", "scheduler")

Velocity = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Transition:
    """One step of the sampler seen as a Gaussian `N(mean, std² I)`.

    Attributes:
        prev_sample (`torch.Tensor` of shape `(B, ...)`): the sample at `t_next`, in the dtype of `x`.
        log_prob (`torch.Tensor` of shape `(B,)`):
            log-density of `prev_sample`, averaged over the latent dimensions; 0 where `std` is 0 (no density there).
        mean (`torch.Tensor` of shape `(B, ...)`): float32, or float64 when `x` is float64.
        std (`torch.Tensor` of shape `(B,)`): likewise.
    """

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor


@dataclass
class Trajectory:
    """What a rollout leaves behind: the final sample, and the states of the steps that will be trained.

    Attributes:
        sample (`torch.Tensor` of shape `(B, ...)`): the sample at the end of the grid.
        times (`list[float]`): the grid, one more than there are steps.
        steps (`tuple[int, ...]`): indices of the kept steps; step `i` leads from `times[i]` to `times[i + 1]`.
        states (`dict[int, torch.Tensor]`): `x` at grid index `i` for every kept step's two ends.
        log_probs (`torch.Tensor` of shape `(B, len(steps))`): log-probabilities as drawn.
    """

    sample: Tensor
    times: list[float]
    steps: tuple[int, ...]
    states: dict[int, Tensor]
    log_probs: Tensor


def time_grid(num_steps: int, *, shift: float = 1.0, last_step_size: float | None = None) -> list[float]:
    """Times from 1 (noise) to 0 (data).

    Args:
        num_steps (`int`): number of steps, i.e. of network evaluations under Euler; the grid has one point more.
        shift (`float`, *optional*, defaults to 1.0):
            resolution shift `t -> shift t / (1 + (shift - 1) t)` of SD3 (arXiv 2403.03206, Eq. 23).
        last_step_size (`float`, *optional*):
            size of the last step, before the shift; the others share the rest evenly. SiT ends its SDE sampler with a
            step of 0.04.

    Returns:
        `list[float]`: `num_steps + 1` decreasing times.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive; 1.0 leaves the grid uniform.")
    if last_step_size is None:
        uniform = [1 - i / num_steps for i in range(num_steps)] + [0.0]
    elif not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size={last_step_size} must lie strictly between 0 and 1, or be None.")
    elif num_steps == 1:
        raise ValueError("last_step_size needs at least 2 steps: one that reaches it and the last one itself.")
    else:
        rest = 1 - last_step_size
        uniform = [1 - rest * i / (num_steps - 1) for i in range(num_steps - 1)] + [last_step_size, 0.0]
    return [shift * t / (1 + (shift - 1) * t) for t in uniform]


def karras_grid(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """EDM's noise levels (arXiv 2206.00364, Eq. 5) as times `t = σ / (1 + σ)`, with 0 at the end.

    A sample `z = x_0 + σ ε` is on the path at `t` as `x_t = z / (1 + σ)`.

    Args:
        num_steps (`int`): number of steps and of noise levels, at least 2; the grid has one point more.
        sigma_min, sigma_max, rho (`float`, *optional*, default to 0.002, 80.0 and 7.0): `σ^(1/ρ)` is evenly spaced.

    Returns:
        `list[float]`: `num_steps + 1` decreasing times, the first a little below 1.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} must be at least 2.")
    if not 0 < sigma_min < sigma_max or rho <= 0:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: they must be positive, sigma_min the smaller."
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [(first + i / (num_steps - 1) * (last - first)) ** rho for i in range(num_steps)]
    return [sigma / (1 + sigma) for sigma in sigmas] + [0.0]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """
    The tensor on `device`. The host does not wait for what is queued on a GPU: copies from pinned memory queue up too,
    while those from other memory begin when the queue is empty.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def gaussian_noise(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise of `shape`; a list of generators gives row `i` from generator `i`.

    One generator per image makes an image independent of the batch or process it was drawn in. Noise is drawn on
    each generator's own device, then moved, so that CPU generators give the same images on every device.
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return send(torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype), device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: pass one per row, or a single one.")
    rows = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return send(torch.stack(rows), device)


def _diffusion(
    t: Tensor, t_next: Tensor, noise_schedule: str, noise_level: float, start: float
) -> tuple[Tensor, Tensor]:
    """The step's noise std, and the coefficient `c` of the predicted noise in `mean = x + v dt + c (x + (1-t) v)`.

    For the three SDE schedules `c = s²/(2t) dt` and `std = s sqrt(-dt)`; for `cps` both follow from its definition.
    """
    step = t - t_next
    if noise_schedule == "cps":  # coefficients-preserving: std = t' sin(eta pi / 2)
        angle = noise_level * math.pi / 2
        return t_next * math.sin(angle), t_next * (math.cos(angle) - 1)
    if noise_schedule == "sit":  # s² = 2 eta² t: SiT's `sigma` form, regular everywhere
        half_rate = torch.full_like(t, noise_level**2)
        variance = 2 * noise_level**2 * t * step
    elif noise_schedule == "flow_grpo":  # s² = eta² t / (1-t), bounded on the first step by its value at t_next
        # of grids from 1, 0.9999 or 0.999 alike, where testing t == 1 would let 1/(1-t) through
        bounded = torch.where(t > start - 1e-6, t_next, t)
        variance = noise_level**2 * bounded / (1 - bounded) * step
        half_rate = variance / (2 * t * step)
    else:  # dance: s² = eta²; nothing later removes the last step's noise, so that step is the plain Euler step
        squared = torch.where(t_next > 0, noise_level**2, 0.0).to(t)
        variance = squared * step
        half_rate = squared / (2 * t)
    return variance.sqrt(), -half_rate * step


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
    """One stochastic step from `t` to `t_next`, or the log-probability of a step that was taken.

    With `prev_sample=None` the next sample is drawn; given, it is scored. Both go through the same arithmetic, so a
    replayed log-probability equals the drawn one bit for bit. With step `dt = t_next - t < 0`, predicted noise
    `x̂_1 = x + (1-t) v` and diffusion `s(t)`:

        mean = x + [v + s²/(2t) x̂_1] dt        std = s sqrt(-dt)

    | `noise_schedule` | `s(t)²` | source |
    |---|---|---|
    | `"sit"` | `2 η² t` | SiT (arXiv 2401.08740), its `sigma` form; η = 1 is SiT's own |
    | `"flow_grpo"` | `η² t/(1-t)`, on the first step its value at `t_next` | Flow-GRPO (arXiv 2505.05470) |
    | `"dance"` | `η²`, last step deterministic | DanceGRPO (arXiv 2505.07818) |
    | `"cps"` | mean `(1-t') x̂_0 + t' cos(ηπ/2) x̂_1`, std `t' sin(ηπ/2)` | coefficients-preserving (arXiv 2509.05952) |

    `noise_level=0` is exactly the ODE's Euler step.

    Args:
        x (`torch.Tensor` of shape `(B, ...)`): sample at `t`.
        velocity (`torch.Tensor` of shape `(B, ...)`): predicted velocity at `x`, `t`.
        t, t_next (`float` or `torch.Tensor` of shape `(B,)`): times with `0 <= t_next < t <= 1`.
        noise_schedule (`str`): one of `"sit"`, `"flow_grpo"`, `"dance"`, `"cps"`.
        noise_level (`float`): η, at least 0; at most 1 for `"cps"`.
        start (`float`, *optional*, defaults to 0.999):
            first time of the grid, by which `"flow_grpo"` knows the first step.
        prev_sample (`torch.Tensor` of shape `(B, ...)`, *optional*): the sample at `t_next` to score.
        generator (`torch.Generator` or list of them, one per row, *optional*): source of the noise.

    Returns:
        [`Transition`]: computed in float32, or in float64 when `x` is float64.

    Raises:
        ValueError: unknown schedule, or a noise level outside its range.
    """
    _check_noise(noise_schedule, noise_level)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state, v = x.to(dtype), velocity.to(dtype)
    batch = x.shape[0]
    t, t_next = _per_row(t, batch, x.device), _per_row(t_next, batch, x.device)

    std, coefficient = _diffusion(t, t_next, noise_schedule, noise_level, start)  # (B,), (B,) float64
    std = std.to(dtype)
    wide = (batch,) + (1,) * (x.ndim - 1)
    dt, remaining, coefficient = ((c.to(dtype).view(wide)) for c in (t_next - t, 1 - t, coefficient))
    mean = state + v * dt + coefficient * (state + remaining * v)

    if prev_sample is None:
        noise = gaussian_noise(x.shape, generator, x.device, dtype)
        prev_sample = (mean + std.view(wide) * noise).to(x.dtype)  # rounded to storage before it is scored
    return Transition(prev_sample, _gaussian_log_prob(prev_sample.to(dtype), mean, std), mean, std)


def _per_row(t: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """Times in float64: differences of rounded times would not be the ODE solver's steps."""  # (B,)
    if isinstance(t, Tensor):
        return t.to(device, torch.float64).expand(batch)
    return torch.full((batch,), t, dtype=torch.float64, device=device)


def _gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(sample; mean, std²), mean over all dimensions but the first; 0 where std is 0."""  # (B,)
    stochastic = std > 0
    scale = torch.where(stochastic, std, 1.0)
    squared = (sample - mean).flatten(1).square().mean(1)
    log_prob = -squared / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(stochastic, log_prob, 0.0)


def _check_noise(noise_schedule: str, noise_level: float) -> None:
    if noise_schedule not in NOISE_SCHEDULES:
        raise ValueError(f"noise_schedule={noise_schedule!r} is unknown: choose one of {', '.join(NOISE_SCHEDULES)}.")
    if not noise_level >= 0 or (noise_schedule == "cps" and noise_level > 1):
        limit = "between 0 and 1 for 'cps'" if noise_schedule == "cps" else "at least 0"
        raise ValueError(f"noise_level={noise_level} must be {limit}.")


def _check_times(times: Sequence[float]) -> None:
    if not all(a > b for a, b in pairwise(times)):  # nor where one is NaN
        raise ValueError("times must strictly decrease from noise (1) to data (0).")


def stochastic_steps(
    times: Sequence[float],
    *,
    noise_schedule: str,
    noise_level: float,
    final_step: str = "sample",
    sde_steps: Iterable[int] | None = None,
) -> tuple[int, ...]:
    """Indices of the steps that have a density, the only ones that can be trained.

    The last step has none under `"cps"` and `"dance"`, nor where the sampler ends with a noiseless "mean" step, nor
    has any step outside `sde_steps`.
    """
    _check_noise(noise_schedule, noise_level)
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
    """Walks the grid with [`transition`], keeping the states only of the steps that will be trained.

    Args:
        velocity (`Callable`): `velocity(x, t)` with `t` of shape `(B,)`.
        x (`torch.Tensor` of shape `(B, ...)`): noise at `times[0]`.
        times (`Sequence[float]`): decreasing grid, e.g. from [`time_grid`].
        noise_schedule, noise_level: as in [`transition`].
        keep_steps (`Iterable[int]`, *optional*): indices of the steps to keep.
        keep_states (`Iterable[int]`, *optional*): grid indices whose states are kept besides the ends of those steps.
        final_step (`str`, *optional*, defaults to `"sample"`):
            `"mean"` leaves the noise of the last step out, as SiT's SDE sampler does.
        sde_steps (`Iterable[int]`, *optional*):
            steps with noise, all by default; the others are Euler steps of the ODE (MixGRPO, arXiv 2507.21802).
        generator (`torch.Generator` or list of them, one per row, *optional*): source of the noise.

    Returns:
        [`Trajectory`].

    Raises:
        ValueError: a kept step is deterministic, or the grid does not decrease.
    """
    if final_step not in ("sample", "mean"):
        raise ValueError(f"final_step={final_step!r} is unknown: choose 'sample' or 'mean'.")
    _check_times(times)
    keep = tuple(sorted(set(keep_steps)))
    noisy = set(range(len(times) - 1) if sde_steps is None else sde_steps)
    trainable = stochastic_steps(
        times, noise_schedule=noise_schedule, noise_level=noise_level, final_step=final_step, sde_steps=noisy
    )
    if not set(keep) <= set(trainable):
        wrong = sorted(set(keep) - set(trainable))
        raise ValueError(f"steps {wrong} have no noise and so no density: keep only steps among {trainable}.")

    ends = {i for step in keep for i in (step, step + 1)} | set(keep_states)
    states = {0: x} if 0 in ends else {}
    log_probs = []
    step_of = partial(transition, noise_schedule=noise_schedule, start=times[0])
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype))
        step = step_of(x, v, t, t_next, noise_level=noise_level if i in noisy else 0.0, generator=generator)
        mean_only = final_step == "mean" and i == len(times) - 2
        x = step.mean.to(x.dtype) if mean_only else step.prev_sample
        if i in keep:
            log_probs.append(step.log_prob)
        if i + 1 in ends:
            states[i + 1] = x
    kept = torch.stack(log_probs, dim=1) if log_probs else x.new_zeros(x.shape[0], 0)
    return Trajectory(sample=x, times=list(times), steps=keep, states=states, log_probs=kept)


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
    The steps from grid index `first` to the end once more, with gradients.

    The noise of a step that was taken is what it ended at minus its mean: a constant. So the values are those of the
    rollout bit for bit, and gradients run through the means, from step to step.

    Args:
        velocity (`Callable`): `velocity(x, t)` with `t` of shape `(B,)`.
        states (`Mapping[int, torch.Tensor]` of shapes `(B, ...)`): where the rollout was, at `first` and after.
        times, noise_schedule, noise_level, sde_steps: as in [`rollout`].

    Returns:
        `torch.Tensor` of shape `(B, ...)`: the sample at the end.
    """
    noisy = set(range(len(times) - 1) if sde_steps is None else sde_steps)
    step_of = partial(transition, noise_schedule=noise_schedule, start=times[0])
    x = states[first]
    for i in range(first, len(times) - 1):
        v = velocity(x, torch.full((x.shape[0],), times[i], device=x.device, dtype=x.dtype))
        level, taken = noise_level if i in noisy else 0.0, states[i + 1]
        mean = step_of(x, v, times[i], times[i + 1], noise_level=level, prev_sample=taken).mean
        x = taken + (mean - mean.detach()).to(taken.dtype)
    return x


@torch.no_grad()
def solve_ode(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    solver: str = "euler",
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> Tensor:
    """Integrates `dx/dt = velocity(x, t)` along the grid.

    `"euler"`: first order, one evaluation a step. `"heun"`: second order, two evaluations a step, the step onto
    `t = 0` being Euler's as in EDM (arXiv 2206.00364, Algorithm 1). `"heun_sigma"` takes Heun's steps where EDM does,
    in the noise level `σ = t/(1-t)` of `z = x_0 + σ x_1`; Euler's are the same on both paths, Heun's are not.
    `"heun2"`: second order in every step, torchdiffeq's method of that name. `"dopri5"`: torchdiffeq's adaptive method
    of fifth order, the default of SiT's code; only the two ends of the grid matter to it.

    Under `"dopri5"` the samples of a batch share their steps, so that a sample depends on the others, within the
    tolerances.

    Args:
        velocity (`Callable`): `velocity(x, t)` with `t` of shape `(B,)`.
        x (`torch.Tensor` of shape `(B, ...)`): noise at `times[0]`.
        times (`Sequence[float]`): decreasing grid.
        solver (`str`, *optional*, defaults to `"euler"`): one of the above.
        rtol, atol (`float`, *optional*, default to 1e-3 and 1e-6): tolerances of `"dopri5"`; the defaults are SiT's.

    Returns:
        `torch.Tensor` of shape `(B, ...)`: the sample at `times[-1]`.

    Raises:
        ValueError: unknown solver, a grid that does not decrease, or `"heun_sigma"` from `t = 1`, where σ is infinite.
        ImportError: `"dopri5"` without torchdiffeq.
    """
    if solver not in ODE_SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose one of {', '.join(ODE_SOLVERS)}.")
    _check_times(times)
    if solver == "heun_sigma" and times[0] >= 1:
        raise ValueError("solver='heun_sigma' needs a grid that starts below 1, such as that of karras_grid.")

    def at(t: float) -> Tensor:
        return torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)

    if solver == "dopri5":
        return _dopri5(velocity, x, times[0], times[-1], rtol, atol)
    for t, t_next in pairwise(times):
        v = velocity(x, at(t))
        euler = x + v * (t_next - t)
        if solver == "heun2" or (solver != "euler" and t_next > 0):
            v_next = velocity(euler, at(t_next))
            if solver == "heun_sigma":  # of the step from x that the noise predicted at its end, x + (1-t) v, makes
                v_next = (euler + (1 - t_next) * v_next - x) / (1 - t)
            x = x + 0.5 * (v + v_next) * (t_next - t)
        else:
            x = euler
    return x


def _dopri5(velocity: Velocity, x: Tensor, start: float, end: float, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "solver='dopri5' needs torchdiffeq: pip install 'trl-distreward[ode]', or choose solver='heun'."
        ) from error

    def backwards(elapsed: Tensor, x: Tensor) -> Tensor:
        return -velocity(x, (start - elapsed).to(x.dtype).expand(x.shape[0]))

    ends = torch.tensor([0.0, start - end], dtype=torch.float64, device=x.device)
    return odeint(backwards, x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]
