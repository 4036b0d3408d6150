# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Power-function averages of a training run, from the checkpoints it left (Karras et al. 2024, arXiv 2312.02696)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST_SIGMA_REL = 12**-0.5  # the uniform average, with gamma = 0


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Computes the exponent of the power function whose std, relative to the training time, is `sigma_rel`."""
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL + 1e-12:
        rule = f"must be above 0 and at most {LARGEST_SIGMA_REL:.4f}, the uniform average"
        raise ValueError(f"sigma_rel={sigma_rel} {rule}; for raw checkpoints use power_profile_coefficients.")
    # (gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3), written as a polynomial; its largest root is real
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def _inner_products(times_a: Tensor, gammas_a: Tensor, times_b: Tensor, gammas_b: Tensor) -> Tensor:
    """Computes inner products `(A, B)` of the profiles `(gamma + 1) t^gamma / T^(gamma + 1)` (Appendix C)."""
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
    Computes the combination of stored averages that is nearest to another average (arXiv 2312.02696, Section 3.2).

    Stored averages and target are power functions of the training time, with relative widths; the target's ends at
    `target_time`. The coefficients `(N_c,)`, float64, solve the least-squares problem of Appendix C in closed form,
    and are divided by their sum; some may be negative.
    """
    times = _times(checkpoint_times, "checkpoint_times")
    stds = torch.as_tensor(checkpoint_stds, dtype=torch.float64)
    if len(torch.stack([times, stds]).unique(dim=1)[0]) < len(times):
        given = f"checkpoint_times={times.tolist()} and checkpoint_stds={stds.tolist()}"
        raise ValueError(f"two of the stored averages at {given} are the same: leave one out.")
    gammas = torch.tensor([sigma_rel_to_gamma(std) for std in stds.tolist()], dtype=torch.float64)
    target = _times([target_time], "target_time"), torch.tensor([sigma_rel_to_gamma(target_std)], dtype=torch.float64)
    gram = _inner_products(times, gammas, times, gammas)
    right = _inner_products(times, gammas, *target)[:, 0]
    scale = gram.diagonal().rsqrt()  # profiles of length one: their Gram matrix is far better conditioned
    coefficients = scale * torch.linalg.solve(scale[:, None] * gram * scale, scale * right)
    return coefficients / coefficients.sum()


def power_profile_coefficients(times: Sequence[float] | Tensor, sigma_rel: float) -> Tensor:
    """
    Computes coefficients `(N_c,)`, float64, of raw checkpoints that follow a power function of the training time.

    Each checkpoint stands for the time since the one before it, the first for as long as the second. Its coefficient
    is the integral over that time of the profile with width `sigma_rel` that ends at the last checkpoint.
    """
    ends = _times(times, "times")
    if bool((ends.diff() <= 0).any()):
        raise ValueError(f"times={ends.tolist()} must increase: sort the checkpoints by training time.")
    start = max(0.0, float(2 * ends[0] - ends[1])) if len(ends) > 1 else 0.0
    gamma = sigma_rel_to_gamma(sigma_rel)
    edges = torch.cat([ends.new_tensor([start]), ends]) / ends[-1]
    mass = (edges ** (gamma + 1)).diff()  # the profile's integral from 0 to each edge
    return mass / mass.sum()
