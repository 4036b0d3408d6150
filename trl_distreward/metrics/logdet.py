# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Change of `Tr A^½` by a low-rank change `A' = A + W₊ᵀW₊ - W₋ᵀW₋`, for many subsets at once.

Because `∫₀^∞ log((a² + s²) / (b² + s²)) ds = π (a - b)`, for symmetric positive semi-definite matrices

    Tr A'^½ - Tr A^½ = 1/π ∫₀^∞ log det[(A' + s²)(A + s²)⁻¹] ds  ≈  Σ_j w_j log det[(A' + s_j²)(A + s_j²)⁻¹]

In the eigenbasis of A, with `M = W (Λ + s²)⁻¹ Wᵀ` and `C = diag(I, -I)`, each determinant is `det(I + MC)`, of the
change's rank (Sylvester). Only Cholesky factors are taken: torch 2.13's batched `slogdet`, `inv` and `lu_factor` are
silently wrong on CPU with two threads or more, for matrices of 151 rows and more.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-7  # error bound relative to the rise and fall of Tr A^½, which sets the number of nodes
TRUNCATION = 1e-11  # singular values that ShiftedGrams leaves out, relative to the largest


# ---- quadrature ----


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
    """
    Quadrature for `[lower, upper]`, with the least multiple of 3 nodes whose error bound is at most `tolerance`.

    The substitution `s = lower · sc(u)` by a Jacobi elliptic function makes the integrand periodic and analytic in the
    widest possible strip, where the midpoint rule converges exponentially (Hale, Higham and Trefethen, "Computing A^α,
    log(A), and related matrix functions by contour integrals", SIAM J. Numer. Anal. 46, 2008, method 3).
    """
    upper = max(upper, 2 * lower)  # keeps the nome below 0.02, so that a dozen terms of its series suffice
    modulus = lower / upper
    quarter, across = _quarter_periods(modulus)  # K(κ) and K(1 - κ) at κ = modulus²
    rate = 2 * math.pi * quarter / across
    num_nodes = 3 * math.ceil(math.log1p(4 / tolerance) / rate / 3)
    u = (torch.arange(num_nodes, dtype=torch.float64) + 0.5) * (across / num_nodes)
    nodes, slopes = _sc(u[: (num_nodes + 1) // 2], modulus, quarter, across)
    nodes, slopes = lower * nodes, lower * slopes
    # sc(K' - u) = 1 / (modulus · sc(u)): mirroring the lower half loses no digits near K'
    mirrored = num_nodes // 2
    upper_nodes = (lower * upper / nodes[:mirrored]).flip(0)
    upper_slopes = (slopes[:mirrored] * lower * upper / nodes[:mirrored] ** 2).flip(0)
    weights = torch.cat([slopes, upper_slopes]) * (across / (num_nodes * math.pi))
    bound, coarse_bound = (error_bound(lower, upper, count) for count in (num_nodes, num_nodes // 3))
    return Quadrature(lower, upper, torch.cat([nodes, upper_nodes]), weights, bound, coarse_bound)


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
    periods = []
    for b in (math.sqrt((1 - modulus) * (1 + modulus)), modulus):
        a = 1.0
        while abs(a - b) > 1e-15 * a:
            a, b = (a + b) / 2, math.sqrt(a * b)
        periods.append(math.pi / (2 * a))
    return periods[0], periods[1]


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


# ---- determinants ----


def whitened_resolvents(eigenvalues: Tensor, shifts: Tensor) -> Tensor:
    """`λ / (λ + s²)`, or `1 / s²` where λ is 0, `(J, d)`: for rows that are divided by `λ^½` where λ is not 0."""
    return torch.where(eigenvalues > 0, eigenvalues, 1.0) / (eigenvalues + shifts[:, None])


class ShiftedGrams:
    """
    `M_j = W (Λ + s_j²)⁻¹ Wᵀ` for many shifts at once, at the price of about nine for features 2048 wide.

    Λ are ascending eigenvalues `(d,)`, shifts `(J,)` are `s_j²`, or a `-τ²` below the eigenvalues that are not 0.
    Within a block of neighbouring eigenvalues the J functions `λ / (λ + s_j²)` are nearly dependent: six or eight of
    their singular vectors carry them to a part in 10¹¹. Each block takes that many products, and the M_j are sums of
    them.
    """

    def __init__(self, eigenvalues: Tensor, shifts: Tensor):
        self.resolvents = whitened_resolvents(eigenvalues, shifts)
        self.blocks: list[tuple[slice, Tensor]] = []  # columns, and the functions of them that are multiplied (k, w)
        mixing = []
        for block in _blocks(eigenvalues):
            values = self.resolvents[:, block]
            size = values.abs().amax(1, keepdim=True)
            left, singular, right = torch.linalg.svd(values / size, full_matrices=False)
            kept = int((singular > TRUNCATION * singular[0]).sum())
            self.blocks.append((block, right[:kept]))
            mixing.append(size * left[:, :kept] * singular[:kept])
        self.mixing = torch.cat(mixing, dim=1)  # (J, terms)

    def __call__(self, rows: Tensor) -> Tensor:
        """Grams `(J, B, r, r)` of rows W `(B, r, d)`, which are divided by `λ^½` where λ is not 0."""
        batch, rank, _ = rows.shape
        if rank <= 7:  # multiplies each pair of rows once
            first, second = torch.tril_indices(rank, rank, device=rows.device)
            pairs = (rows[:, first] * rows[:, second]) @ self.resolvents.T  # (B, p, J)
            result = torch.empty(len(self.resolvents), batch, rank, rank, dtype=torch.float64, device=rows.device)
            result[:, :, first, second] = result[:, :, second, first] = pairs.permute(2, 0, 1)
            return result
        terms = rows.new_empty(self.mixing.shape[1], batch, rank, rank)
        position = 0
        for block, functions in self.blocks:
            part = rows[:, :, block].contiguous()
            for function in functions:
                torch.bmm(part * function, part.mT, out=terms[position])
                position += 1
        return (self.mixing @ terms.flatten(1)).view(-1, batch, rank, rank)

    def bytes_per_subset(self, rank: int) -> int:
        """Work space for a subset whose change has that rank, including the factors that follow."""
        width, shifts = self.resolvents.shape[1], len(self.resolvents)
        if rank <= 7:
            return 8 * (3 * rank**2 * width + 6 * shifts * rank**2)
        return 8 * (5 * rank * width + (self.mixing.shape[1] + 5 * shifts) * rank**2)


def _blocks(eigenvalues: Tensor) -> list[slice]:
    """At most 8 blocks, similar in their number of eigenvalues and in the range of these; zeros are one more."""
    zeros = int((eigenvalues <= 0).sum())
    positive = eigenvalues[zeros:]
    blocks = [slice(0, zeros)] if zeros else []
    if len(positive) == 0:
        return blocks
    logs = positive.log()
    height = (logs - logs[0]) / (logs[-1] - logs[0]).clamp(min=1e-9)
    place = height + torch.linspace(0, 1, len(positive), dtype=logs.dtype, device=logs.device)
    count = max(1, min(8, len(positive) // 128))
    edges = torch.searchsorted(place, torch.linspace(0, 2, count + 1).to(place)[1:-1]).tolist()
    ends = [0, *edges, len(positive)]
    return blocks + [slice(zeros + a, zeros + b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


class Factors(NamedTuple):
    """`C + M = [[L₁, 0], [Tᵀ, L₂]] C [[L₁, 0], [Tᵀ, L₂]]ᵀ`, for n added and k removed rows."""

    added: Tensor  # L₁, (..., n, n)
    cross: Tensor  # T, (..., n, k)
    removed: Tensor  # L₂, (..., k, k)
    failed: Tensor  # (...,), bool: a factor does not exist

    @property
    def rise(self) -> Tensor:
        """`log det(I + M₊₊) >= 0`, the contribution of the added rows."""
        return 2 * self.added.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def fall(self) -> Tensor:
        """`-log det(I - M₋₋ + TᵀT) >= 0`, the loss by the rows removed afterwards."""
        return -2 * self.removed.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def inverse_forms(self, vectors_added: Tensor, vectors_removed: Tensor) -> Tensor:
        """`vᵀ (C + M)⁻¹ v` for the columns v of `(..., n, m)` above `(..., k, m)`; `(..., m)`."""
        top = torch.linalg.solve_triangular(self.added, vectors_added, upper=False)
        rest = vectors_removed - self.cross.mT @ top
        bottom = torch.linalg.solve_triangular(self.removed, rest, upper=False)
        return top.square().sum(-2) - bottom.square().sum(-2)


def factorize(grams: Tensor, added: int) -> Factors:
    """Factors of grams M `(..., n + k, n + k)`. The n added rows come first: so both factors are positive definite."""
    plus = grams[..., :added, :added].clone()
    plus.diagonal(dim1=-2, dim2=-1).add_(1)
    upper, info_upper = torch.linalg.cholesky_ex(plus)
    cross = torch.linalg.solve_triangular(upper, grams[..., :added, added:], upper=False)
    minus = cross.mT @ cross - grams[..., added:, added:]
    minus.diagonal(dim1=-2, dim2=-1).add_(1)
    lower, info_lower = torch.linalg.cholesky_ex(minus)
    return Factors(upper, cross, lower, (info_upper != 0) | (info_lower != 0))


def eigenvalues_above(grams: Tensor, added: int) -> Tensor:
    """
    Whether `A'` has as many eigenvalues at or above `τ²` as A, from grams `(..., r, r)` at the shift `-τ²`:
    Sylvester's law of inertia on `[[A - τ², Wᵀ], [W, -C]]`, whose Schur complements are `A' - τ²` and `-(C + M)`.
    """
    signs = torch.ones(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    signs[added:] = -1
    positive = (torch.linalg.eigvalsh(grams + torch.diag(signs)) > 0).sum(-1)
    return positive <= added
