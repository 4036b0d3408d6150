# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math
from itertools import pairwise

import pytest
import torch

from trl_distreward.generation import SamplingSchedule
from trl_distreward.sampling import (
    NOISE_SCHEDULES,
    gaussian_noise,
    rollout,
    solve_ode,
    stochastic_steps,
    time_grid,
    transition,
)

CPU = torch.device("cpu")
schedules = pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)

# 2-D Gaussian data, narrower than the noise in one direction and wider in the other. Its velocity is known exactly.
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5], dtype=torch.float64)


def gaussian_velocity(x, t, mean=MEAN, std=STD):
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    variance = (1 - t) ** 2 * std**2 + t**2
    centred = x - (1 - t) * mean
    return t / variance * centred - (mean + (1 - t) * std**2 / variance * centred)


def exact_moments(t, mean=MEAN, std=STD):
    return (1 - t) * mean, (1 - t) ** 2 * std**2 + t**2


def propagated_moments(times, noise_schedule, noise_level, mean=MEAN, std=STD):
    """Mean and variance after each step. Steps are affine in x, so two probes give them exactly."""
    moment = exact_moments(torch.tensor(times[0], dtype=torch.float64), mean, std)
    probes = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    noise = {"noise_schedule": noise_schedule, "noise_level": noise_level}
    for t, t_next in pairwise(times):
        step = transition(probes, gaussian_velocity(probes, t, mean, std), t, t_next, prev_sample=probes, **noise)
        offset, slope = step.mean[0], step.mean[1] - step.mean[0]
        moment = (slope * moment[0] + offset, slope**2 * moment[1] + step.std[0] ** 2)
        yield moment


def variance_errors(num_steps, noise_schedule, noise_level, **data):
    times, errors = time_grid(num_steps), []
    moments = propagated_moments(times, noise_schedule, noise_level, **data)
    for (mean, variance), t in zip(moments, times[1:], strict=True):
        exact_mean, exact_variance = exact_moments(t, **data)
        torch.testing.assert_close(mean, exact_mean, atol=1e-12, rtol=0)
        errors.append((variance / exact_variance - 1).abs().max().item())
    return errors


@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replayed_log_prob_equals_the_drawn_one_to_the_last_bit(noise_schedule, dtype):
    x, v = torch.randn(5, 3, 4, 4).to(dtype), torch.randn(5, 3, 4, 4).to(dtype)
    kwargs = {"noise_schedule": noise_schedule, "noise_level": 0.7}
    for t, t_next in pairwise(time_grid(10)):
        drawn = transition(x, v, t, t_next, **kwargs)
        times = (torch.full((5,), value, dtype=torch.float64) for value in (t, t_next))
        replayed = transition(x, v, *times, prev_sample=drawn.prev_sample, **kwargs)
        assert drawn.prev_sample.dtype == dtype
        assert torch.equal(drawn.log_prob, replayed.log_prob)


@schedules
def test_log_prob_is_the_gaussian_density_averaged_over_dimensions(noise_schedule):
    x, v = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    t, t_next = torch.rand(5, dtype=torch.float64) * 0.4 + 0.5, torch.rand(5, dtype=torch.float64) * 0.4 + 0.05
    step = transition(x, v, t, t_next, noise_schedule=noise_schedule, noise_level=0.6)
    density = torch.distributions.Normal(step.mean, step.std[:, None]).log_prob(step.prev_sample)
    torch.testing.assert_close(step.log_prob, density.mean(1))
    assert step.log_prob.dtype == torch.float64


def test_mean_and_std_are_those_of_the_sde():
    x, v = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    t, t_next, eta = 0.6, 0.5, 0.8
    squared = {"sit": 2 * eta**2 * t, "flow_grpo": eta**2 * t / (1 - t), "dance": eta**2}
    for noise_schedule, s2 in squared.items():
        step = transition(x, v, t, t_next, noise_schedule=noise_schedule, noise_level=eta)
        torch.testing.assert_close(step.mean, x + (v + s2 / (2 * t) * (x + (1 - t) * v)) * (t_next - t))
        torch.testing.assert_close(step.std, torch.full((4,), math.sqrt(s2 * (t - t_next)), dtype=torch.float64))
    step = transition(x, v, t, t_next, noise_schedule="cps", noise_level=eta)
    std = t_next * math.sin(eta * math.pi / 2)
    data, noise = x - t * v, x + (1 - t) * v
    torch.testing.assert_close(step.mean, (1 - t_next) * data + math.sqrt(t_next**2 - std**2) * noise)
    torch.testing.assert_close(step.std, torch.full((4,), std, dtype=torch.float64))


@schedules
def test_without_noise_a_step_is_eulers(noise_schedule):
    x, times = torch.randn(3, 1, 4, 4), time_grid(7)
    trajectory = rollout(gaussian_like, x, times, noise_schedule=noise_schedule, noise_level=0.0)
    assert torch.equal(trajectory.sample, solve_ode(gaussian_like, x, times))


def gaussian_like(x, t):
    return torch.tanh(x) * (1 + t.view(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("noise_schedule", ["sit", "dance"])
def test_marginals_are_kept_and_their_error_vanishes_as_one_over_steps(noise_schedule):
    coarse = variance_errors(50, noise_schedule, 0.7)
    fine = variance_errors(400, noise_schedule, 0.7)
    assert max(coarse) < 0.05
    assert max(fine) < 1.3 * max(coarse) / 8  # eight times the steps, an eighth of the error


def test_flow_grpo_marginals_recover_from_the_singular_first_steps():
    # Near t = 1 its noise per step does not shrink with the grid: the error stays there and fades below.
    coarse, fine = variance_errors(50, "flow_grpo", 0.7), variance_errors(400, "flow_grpo", 0.7)
    assert max(coarse) < 0.12
    assert fine[199] < 0.5 * coarse[24]  # both at t = 0.5
    assert max(coarse[-5:]) < 0.01 and max(fine[-40:]) < 0.01


def test_cps_marginals_are_exact_for_concentrated_data_at_any_step_count():
    point = {"mean": MEAN, "std": torch.full((2,), 1e-9, dtype=torch.float64)}
    for num_steps in (2, 7, 50):
        assert max(variance_errors(num_steps, "cps", 0.7, **point)[:-1]) < 1e-9


@schedules
@pytest.mark.parametrize("start", [1.0, 0.9999, 0.999])
def test_drawn_samples_have_the_propagated_moments_at_every_time(noise_schedule, start):
    times, count, generator = [start, *time_grid(50)[1:]], 20_000, torch.Generator().manual_seed(1)
    mean, variance = exact_moments(start)
    x = mean + variance.sqrt() * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    moments, noise = propagated_moments(times, noise_schedule, 0.7), {"noise_schedule": noise_schedule}
    for (t, t_next), (mean, variance) in zip(pairwise(times), moments, strict=True):
        step = transition(x, gaussian_velocity(x, t), t, t_next, noise_level=0.7, generator=generator, **noise)
        x = step.prev_sample
        assert x.isfinite().all()
        assert step.std.max() <= 1.0  # also at the singular end
        bound = 5 / math.sqrt(count)  # five Monte-Carlo standard errors
        assert ((x.mean(0) - mean).abs() / variance.sqrt()).max() < bound
        assert (x.var(0) / variance - 1).abs().max() < bound * math.sqrt(2)


@pytest.mark.parametrize(("num_steps", "shift"), [(2, 3.0), (3, 6.0), (3, 12.0), (5, 12.0), (10, 1.0)])
def test_only_the_first_step_is_bounded_whatever_the_grid(num_steps, shift):
    times = time_grid(num_steps, shift=shift)
    noise = {"noise_schedule": "flow_grpo", "noise_level": 0.7}
    assert stochastic_steps(times, **noise) == tuple(range(num_steps))
    x = torch.randn(3, 4, dtype=torch.float64)
    for i, (t, t_next) in enumerate(pairwise(times)):
        at = t_next if i == 0 else t
        expected = 0.7 * math.sqrt(at / (1 - at) * (t - t_next))
        assert transition(x, x, t, t_next, start=times[0], **noise).std.tolist() == pytest.approx([expected] * 3)


@schedules
def test_rollout_keeps_the_asked_steps_and_they_replay(noise_schedule):
    x, times = torch.randn(6, 1, 4, 4), time_grid(8, last_step_size=0.04)
    kept, noise = (2, 3, 6), {"noise_schedule": noise_schedule, "noise_level": 0.5}
    assert stochastic_steps(times, final_step="mean", **noise) == tuple(range(7))  # all but the last
    trajectory = rollout(gaussian_like, x, times, keep_steps=kept, final_step="mean", **noise)
    assert set(trajectory.states) == {2, 3, 4, 6, 7}
    assert trajectory.log_probs.shape == (6, 3)
    for column, i in enumerate(kept):
        state, taken = trajectory.states[i], trajectory.states[i + 1]
        velocity = gaussian_like(state, torch.full((6,), times[i]))
        replay = transition(state, velocity, times[i], times[i + 1], prev_sample=taken, **noise)
        assert torch.equal(replay.log_prob, trajectory.log_probs[:, column])


def test_deterministic_steps_have_no_density():
    x = torch.randn(2, 5)
    step = transition(x, x, 0.1, 0.0, noise_schedule="cps", noise_level=0.7)
    assert (step.std == 0).all() and (step.log_prob == 0).all() and torch.equal(step.prev_sample, step.mean)
    for noise_schedule in ("cps", "dance"):
        assert stochastic_steps(time_grid(5), noise_schedule=noise_schedule, noise_level=0.7) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="no density"):
        rollout(gaussian_like, x, time_grid(5), noise_schedule="cps", noise_level=0.7, keep_steps=[4])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    x = torch.randn(50, 2, dtype=torch.float64)
    exact = MEAN + STD * x  # the ODE carries quantiles of the noise to quantiles of the data
    coarse, fine = (
        (solve_ode(gaussian_velocity, x, time_grid(steps), solver=solver) - exact).abs().max() for steps in (40, 80)
    )
    assert coarse / fine == pytest.approx(2**order, rel=0.125)


def test_time_grids_end_with_the_asked_step_and_are_shifted():
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(3, last_step_size=0.04) == pytest.approx([1.0, 0.52, 0.04, 0.0])
    assert time_grid(10, shift=3.0)[::5] == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: transition(x, x, 0.5, 0.4, noise_schedule="ddpm", noise_level=1.0), "noise_schedule='ddpm'"),
        (lambda x: transition(x, x, 0.5, 0.4, noise_schedule="cps", noise_level=1.2), "between 0 and 1"),
        (lambda x: transition(x, x, 0.5, 0.4, noise_schedule="sit", noise_level=-0.1), "noise_level=-0.1"),
        (lambda x: time_grid(0), "num_steps=0"),
        (lambda x: time_grid(5, last_step_size=1.5), "last_step_size=1.5"),
        (lambda x: gaussian_noise((3, 2), [torch.Generator()], x.device, x.dtype), "1 generators for a batch of 3"),
    ],
)
def test_impossible_steps_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3))


def test_dopri5_solves_within_its_tolerance():
    pytest.importorskip("torchdiffeq")
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3)
    # dx/dt = -3 t² x from t = 1 to 0 multiplies x by e
    solved = solve_ode(lambda x, t: -3 * t.view(-1, 1) ** 2 * x, x, [1.0, 0.5, 0.0], solver="dopri5")
    torch.testing.assert_close(solved, x * math.e, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("heun", 9)])
def test_schedules_count_their_network_evaluations(solver, evaluations):
    calls = []
    solve_ode(lambda x, t: calls.append(1) or x, torch.ones(2, 1), time_grid(5), solver=solver)
    assert len(calls) == evaluations == SamplingSchedule(5, "ode", solver=solver).num_evaluations
    assert SamplingSchedule(5, "ode", solver="dopri5").num_evaluations is None
