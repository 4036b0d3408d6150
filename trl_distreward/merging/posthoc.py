# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Power-function averages of a training run, from the checkpoints it left (Karras et al. 2024, arXiv 2312.02696)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST_SIGMA_REL = 12**-0.5  # of gamma = 0, the uniform average


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """
    The exponent of the power function of a relative width (arXiv 2312.02696, Section 3.1).

    Args:
        sigma_rel (`float`): standard deviation of the profile over the training time, in (0, 1 / √12].

    Returns:
        `float`: `gamma >= 0`, e.g. 16.97 for 0.05 and 6.94 for 0.10.

    Raises:
        ValueError: `sigma_rel` is out of range.
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL + 1e-12:
        raise ValueError(
            f"sigma_rel={sigma_rel} is no width of a power function: choose one above 0 and at most "
            f"{LARGEST_SIGMA_REL:.4f}, the uniform average; a raw checkpoint has no width, see "
            "power_profile_coefficients."
        )
    # (gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3), written as a polynomial; its largest root is real
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def gamma_to_sigma_rel(gamma: float) -> float:
    """
    The relative width of the power function `t ** gamma` (arXiv 2312.02696, Section 3.1).

    Args:
        gamma (`float`): exponent, at least 0.

    Returns:
        `float`: standard deviation of the profile over the training time.

    Raises:
        ValueError: `gamma` is negative or not finite.
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma} is no exponent of an average: choose a finite one of at least 0.")
    return float((gamma + 1) ** 0.5 * (gamma + 2) ** -1 * (gamma + 3) ** -0.5)


def _inner_products(times_a: Tensor, gammas_a: Tensor, times_b: Tensor, gammas_b: Tensor) -> Tensor:
    """Of the profiles `(gamma + 1) t^gamma / T^(gamma + 1)` on [0, T], `(A,)` and `(B,)`, as `(A, B)` (Appendix C)."""
    times_a, gammas_a = times_a[:, None], gammas_a[:, None]
    exponent = torch.where(times_a < times_b, gammas_b, -gammas_a)
    height = (gammas_a + 1) * (gammas_b + 1) / ((gammas_a + gammas_b + 1) * torch.maximum(times_a, times_b))
    return height * (times_a / times_b) ** exponent


def _times(values: Sequence[float] | Tensor, name: str) -> Tensor:
    times = torch.as_tensor(values, dtype=torch.float64)
    if times.ndim != 1 or not len(times) or not bool((torch.isfinite(times) & (times > 0)).all()):
        raise ValueError(f"{name}={times.tolist()} must be a list of positive, finite training times.")
    return times


def posthoc_ema_coefficients(
    checkpoint_times: Sequence[float] | Tensor,
    checkpoint_stds: Sequence[float] | Tensor,
    target_time: float,
    target_std: float,
) -> Tensor:
    """
    Coefficients of stored averages whose combination is nearest to another average (arXiv 2312.02696, Section 3.2).

    Stored averages and target are power functions of the training time; the coefficients solve the least-squares
    problem of Appendix C, whose integrals are closed forms, and are divided by their sum.

    Args:
        checkpoint_times (`list[float]` of length N_c): training time of each stored average, in any unit above 0.
        checkpoint_stds (`list[float]` of length N_c): its relative width `sigma_rel`.
        target_time (`float`): training time at which the target's profile ends, in the same unit.
        target_std (`float`): the target's relative width.

    Returns:
        `torch.Tensor` of shape `(N_c,)`, float64, that sums to one; some may be negative.

    Raises:
        ValueError: a time or width is out of range, or two stored averages are the same.

    Example:

    ```python
    >>> from trl_distreward.merging import posthoc_ema_coefficients
    >>> posthoc_ema_coefficients([1000, 1000], [0.05, 0.10], 1000, 0.10)
    tensor([0., 1.], dtype=torch.float64)

    ```
    """
    times = _times(checkpoint_times, "checkpoint_times")
    stds = torch.as_tensor(checkpoint_stds, dtype=torch.float64)
    if stds.shape != times.shape:
        raise ValueError(
            f"checkpoint_stds has shape {tuple(stds.shape)} for {len(times)} checkpoint_times: give one width each."
        )
    gammas = torch.tensor([sigma_rel_to_gamma(std) for std in stds.tolist()], dtype=torch.float64)
    target = _times([target_time], "target_time"), torch.tensor([sigma_rel_to_gamma(target_std)], dtype=torch.float64)
    gram = _inner_products(times, gammas, times, gammas)
    right = _inner_products(times, gammas, *target)[:, 0]
    scale = gram.diagonal().rsqrt()  # profiles of length one: their Gram matrix is far better conditioned
    solution, info = torch.linalg.solve_ex(scale[:, None] * gram * scale, scale * right)
    coefficients = scale * solution
    different = len(torch.stack([times, stds]).unique(dim=1)[0])
    if different < len(times) or info or not bool(torch.isfinite(coefficients).all()):
        raise ValueError(
            f"two of the stored averages at checkpoint_times={times.tolist()} and checkpoint_stds={stds.tolist()} are "
            "the same: leave one out."
        )
    return coefficients / coefficients.sum()


def power_profile_coefficients(
    times: Sequence[float] | Tensor, sigma_rel: float, start: float | None = None
) -> Tensor:
    """
    Coefficients of raw checkpoints that follow a power function of the training time.

    A checkpoint stands for the time since the one before it, and weighs what the profile of width `sigma_rel`, which
    ends at the last checkpoint, has there. For evenly spaced checkpoints this is an average of them that grows from
    uniform, at `sigma_rel = 1 / √12`, to the last one alone as `sigma_rel` goes to 0.

    Args:
        times (`list[float]` of length N_c): training time of each checkpoint, increasing, in any unit above 0.
        sigma_rel (`float`): relative width of the profile, in (0, 1 / √12].
        start (`float`, *optional*):
            time from which on the first checkpoint stands; by default as long before it as the second one is after,
            but not before 0.

    Returns:
        `torch.Tensor` of shape `(N_c,)`, float64, positive, that sums to one.

    Raises:
        ValueError: times do not increase, or `sigma_rel` or `start` is out of range.
    """
    ends = _times(times, "times")
    if bool((ends.diff() <= 0).any()):
        raise ValueError(f"times={ends.tolist()} must increase: sort the checkpoints by training time.")
    if start is None:
        start = max(0.0, float(2 * ends[0] - ends[1])) if len(ends) > 1 else 0.0
    if not 0 <= start < float(ends[0]):
        raise ValueError(f"start={start} must be at least 0 and before the first checkpoint at {float(ends[0])}.")
    gamma = sigma_rel_to_gamma(sigma_rel)
    edges = torch.cat([ends.new_tensor([start]), ends]) / ends[-1]
    mass = (edges ** (gamma + 1)).diff()  # the profile's integral from 0 to each edge
    return mass / mass.sum()
