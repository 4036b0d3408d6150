# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Coefficients of power-function averages: known values, exactness, and optimality by quadrature."""

import pytest
import torch

from trl_distreward.merging import posthoc_ema_coefficients, power_profile_coefficients, sigma_rel_to_gamma

TIMES = [738197, 939524, 1140850, 1342177, 1543503, 1744830, 1946157, 2147483]


def profile(grid, time, sigma_rel):
    """Returns the normalized power function on a fine grid, zero after its time."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    return torch.where(grid <= time, (gamma + 1) / time * (grid / time) ** gamma, 0.0)


def test_gammas_match_the_paper():
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    assert sigma_rel_to_gamma(12**-0.5) == pytest.approx(0.0, abs=1e-9)


def test_stored_average_is_reproduced():
    stds = [0.05, 0.10] * 4
    times = [time for time in TIMES[::2] for _ in range(2)]
    for index in range(len(times)):
        coefficients = posthoc_ema_coefficients(times, stds, times[index], stds[index])
        expected = torch.zeros(len(times), dtype=torch.float64)
        expected[index] = 1
        torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", [0.03, 0.08, 0.15])
def test_coefficients_are_the_least_squares_fit(target):
    """Compares with a fit of the profiles on a grid, which shares no formula with the closed form."""
    times, stds = [0.4, 0.6, 0.8, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1, 0.05]
    grid = (torch.arange(100_000).double() + 0.5) / 100_000
    stored = torch.stack([profile(grid, t, s) for t, s in zip(times, stds, strict=True)], dim=1)
    fit = torch.linalg.lstsq(stored, profile(grid, 1.0, target)[:, None], driver="gelsd").solution[:, 0]
    coefficients = posthoc_ema_coefficients(times, stds, 1.0, target)
    torch.testing.assert_close(coefficients, fit / fit.sum(), rtol=1e-3, atol=1e-4)
    assert coefficients.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], [0.1, 0.1], 1.0, 0.1), "are the same"),
        (([1.0, -1.0], [0.1, 0.2], 1.0, 0.1), "positive"),
        (([1.0], [0.0], 1.0, 0.1), "raw checkpoint"),
        (([1.0], [0.1], 1.0, 0.3), "sigma_rel=0.3"),
        (([1.0], [0.1], float("nan"), 0.1), "target_time"),
    ],
)
def test_impossible_averages_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        posthoc_ema_coefficients(*arguments)


def test_raw_checkpoints_go_from_uniform_to_the_last():
    times = [100.0, 200.0, 300.0, 400.0]
    uniform = power_profile_coefficients(times, 12**-0.5)
    torch.testing.assert_close(uniform, torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=1e-12)
    assert power_profile_coefficients(times, 0.001)[-1] > 1 - 1e-12
    for sigma_rel in (0.02, 0.1, 0.2):
        weights = power_profile_coefficients(times, sigma_rel)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12) and bool((weights.diff() > 0).all())


def test_raw_coefficients_are_integrals_of_the_profile():
    grid = (torch.arange(400_000).double() + 0.5) / 400_000 * 10
    times, start = [4.0, 5.0, 7.0, 10.0], 3.0  # the first stands for as long as the second
    density = profile(grid, 10.0, 0.15)
    mass = [density[(grid > a) & (grid <= b)].sum() for a, b in zip([start, *times[:-1]], times, strict=True)]
    expected = torch.stack(mass) / sum(mass)
    torch.testing.assert_close(power_profile_coefficients(times, 0.15), expected, rtol=1e-4, atol=0)
    assert power_profile_coefficients([5.0], 0.1).tolist() == [1.0]


@pytest.mark.parametrize("times", [[1.0, 1.0], [2.0, 1.0], []])
def test_times_that_do_not_increase_are_refused(times):
    with pytest.raises(ValueError, match="must"):
        power_profile_coefficients(times, 0.1)
