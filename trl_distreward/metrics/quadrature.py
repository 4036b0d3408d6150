# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Change of `Tr A^½` from log-determinants, by a quadrature with an a-priori error bound.

For symmetric positive semi-definite matrices, because `∫₀^∞ log((a² + s²) / (b² + s²)) ds = π (a - b)`,

    Tr A'^½ - Tr A^½ = 1/π ∫₀^∞ log det[(A' + s²)(A + s²)⁻¹] ds  ≈  Σ_j w_j log det[(A' + s_j²)(A + s_j²)⁻¹]

The substitution `s = lower · sc(u)` by a Jacobi elliptic function makes the integrand periodic and analytic in the
widest possible strip, where the midpoint rule converges exponentially (Hale, Higham and Trefethen, "Computing A^α,
log(A), and related matrix functions by contour integrals", SIAM J. Numer. Anal. 46, 2008, method 3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-7  # error bound relative to the rise and fall of Tr A^½, which sets the number of nodes


@dataclass(frozen=True)
class Quadrature:
    """
    Nodes and weights for spectra of `A^½` in `[lower, upper]`; zeros that `A` and `A'` share do not matter.

    The bound δ is the largest relative error on the square root of one number in the interval. If the trace changes by
    the sum of a rise `Δ₊` and a fall `Δ₋`, the error is at most `δ (Δ₊ + Δ₋)`.
    """

    lower: float
    upper: float
    nodes: Tensor  # s_j, ascending, float64
    weights: Tensor  # w_j, float64
    bound: float  # δ
    coarse_bound: float  # δ of the rule of every third node

    @property
    def coarse(self) -> Tensor:
        """Weights of the rule of every third node, which estimates the error at no cost."""
        weights = torch.zeros_like(self.weights)
        weights[1::3] = 3 * self.weights[1::3]
        return weights


def elliptic_quadrature(lower: float, upper: float, tolerance: float = TOLERANCE) -> Quadrature:
    """Quadrature for `[lower, upper]`, with the least multiple of 3 nodes whose error bound is at most `tolerance`."""
    upper = max(upper, 2 * lower)  # keeps the nome below 0.02, so that a dozen terms of its series suffice
    modulus = lower / upper
    quarter, across = _quarter_periods(modulus)  # K(κ) and K(1 - κ) at κ = modulus²
    rate = 2 * math.pi * quarter / across
    num_nodes = 3 * math.ceil(math.log1p(4 / tolerance) / rate / 3)
    u = (torch.arange(num_nodes, dtype=torch.float64) + 0.5) * (across / num_nodes)
    half = u[: (num_nodes + 1) // 2]
    nodes, slopes = _sc(half, modulus, quarter, across)
    nodes, slopes = lower * nodes, lower * slopes
    # sc(K' - u) = 1 / (modulus · sc(u)): mirroring the lower half loses no digits near K'
    mirrored = num_nodes // 2
    upper_nodes = (lower * upper / nodes[:mirrored]).flip(0)
    upper_slopes = (slopes[:mirrored] * lower * upper / nodes[:mirrored] ** 2).flip(0)
    return Quadrature(
        lower,
        upper,
        torch.cat([nodes, upper_nodes]),
        torch.cat([slopes, upper_slopes]) * (across / (num_nodes * math.pi)),
        error_bound(lower, upper, num_nodes),
        error_bound(lower, upper, num_nodes // 3),
    )


def error_bound(lower: float, upper: float, num_nodes: int) -> float:
    """
    A-priori error bound of the rule: `δ = 4ρ / (1 - ρ)`, `ρ = exp(-2π n K(κ) / K(1 - κ))`, `κ = (lower / upper)²`.

    The integrand's slope for one eigenvalue has period `2K(1 - κ)` and four simple poles in it, at distance `K(κ)`
    from the real line and with residues of size `1/π`; each adds at most `2ρ / (1 - ρ)` to an integral of 2.
    """
    quarter, across = _quarter_periods(lower / upper)
    rho = math.exp(-2 * math.pi * num_nodes * quarter / across)
    return 4 * rho / (1 - rho)


def _quarter_periods(modulus: float) -> tuple[float, float]:
    """`K` at the modulus and at its complement, by the arithmetic-geometric mean."""
    complement = math.sqrt((1 - modulus) * (1 + modulus))
    return math.pi / (2 * _agm(complement)), math.pi / (2 * _agm(modulus))


def _agm(b: float) -> float:
    a = 1.0
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _sc(u: Tensor, modulus: float, quarter: float, across: float) -> tuple[Tensor, Tensor]:
    """
    `sn/cn` at the complementary modulus and its derivative `dn/cn²`, for `0 < u <= across / 2`.

    By Jacobi's imaginary transformation it is `-i sn(iu)` at the small modulus. Its Fourier series in the nome (DLMF
    22.11.1) has only positive terms, so it keeps all digits where `1 - κ` rounds to 1 and library routines lose them.
    """
    odd = 2 * torch.arange(24, dtype=torch.float64) + 1
    x = odd * (math.pi / (2 * quarter)) * u[:, None]  # sinh(x) times the nome's power, kept from overflowing
    decay = torch.exp(x - odd * (math.pi * across / (2 * quarter))) / 2
    factor = decay / -torch.expm1(-odd * (math.pi * across / quarter)) * (2 * math.pi / (modulus * quarter))
    value = (factor * -torch.expm1(-2 * x)).sum(1)
    slope = (factor * (1 + torch.exp(-2 * x)) * odd * (math.pi / (2 * quarter))).sum(1)
    return value, slope
