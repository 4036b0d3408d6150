# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Maximum mean discrepancy between sets of features, and its exact value after replacing rows of one.

For a kernel `k`, `N` generated rows `g` and `M` real rows `r` (Gretton et al., JMLR 2012, Eq. 3 and Lemma 6):

    MMD²_u = Σ_{i≠j} k(g_i, g_j) / (N(N-1)) + Σ_{i≠j} k(r_i, r_j) / (M(M-1)) - 2 Σ_ij k(g_i, r_j) / (NM)     unbiased
    MMD²_b = Σ_ij  k(g_i, g_j) / N²         + Σ_ij  k(r_i, r_j) / M²         - 2 Σ_ij k(g_i, r_j) / (NM)     biased

A constant added to `k` cancels in both. So all sums here are sums of `k - k₀`, with `k₀` the kernel's value at the
centre of the real rows. These numbers are small, and MMD², a small difference of means of `k`, keeps its digits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_features, check_replacement
from .precision import full_precision


@dataclass(frozen=True)
class _Rows:
    """Rows about the centre, and per row the terms that turn their inner products into kernel values."""

    centred: Tensor  # (P, d) in the distance's dtype
    square: Tensor  # (P,) float64, |z|²
    term: Tensor  # (P,) float64: γ μ·z of the polynomial kernel, |z|² of the Gaussian one

    def __getitem__(self, key: slice | Tensor) -> "_Rows":
        return _Rows(self.centred[key], self.square[key], self.term[key])

    def __len__(self) -> int:
        return len(self.term)

    def to(self, device: torch.device) -> "_Rows":
        return _Rows(self.centred.to(device), self.square.to(device), self.term.to(device))

    def double(self) -> "_Rows":
        return _Rows(self.centred.double(), self.square, self.term)


class _Sums(NamedTuple):
    """The sums in MMD² that depend on the generated set; of one set or, batched, of many."""

    pairs: Tensor  # Σ_{i≠j} k(g_i, g_j)
    diagonal: Tensor  # Σ_i k(g_i, g_i)
    cross: Tensor  # Σ_i mean_r k(g_i, r)

    def without(self, row: "_Sums") -> "_Sums":
        """Sums of the set without a row. `row.pairs` is the row's sum over the others, which the set counts twice."""
        return _Sums(self.pairs - 2 * row.pairs, self.diagonal - row.diagonal, self.cross - row.cross)


class KernelDistance:
    """
    Squared maximum mean discrepancy (MMD²) of a reference set from real features, and its exact values after some of
    its rows are replaced or left out.

    Inner products are float64 if the real set has at most `float64_elements` numbers, and float32 beyond, which
    changes `replaced` by 1.4e-6 of its standard deviation over subsets; kernel values and sums are always float64.

    Args:
        real_features (`torch.Tensor` of shape `(M, d)`): the real features, any float dtype, M ≥ 2.
        kernel (`str`, *optional*, defaults to `"polynomial"`): `(x·y / d + 1)³` as in the kernel inception distance
            (Bińkowski et al., arXiv 1801.01401), over whole sets; or `"gaussian"`, the *mean* over `bandwidths` σ of
            `exp(-|x - y|² / 2σ²)`, by default 0.5, 1 and 2 times the median distance between at most 2,000 real rows.
        unbiased (`bool`, *optional*, defaults to `True`): the U-statistic, whose expectation does not depend on the
            sets' sizes, and which can be negative. Otherwise the V-statistic, which is never negative.
    """

    memory_budget = 2**28  # bytes of work space for a block of kernel values or a batch of subsets
    float64_elements = 2**22  # numbers in the real set up to which inner products are float64

    reference_set: _Rows
    value: float

    def __init__(
        self,
        real_features: Tensor,
        kernel: str = "polynomial",
        unbiased: bool = True,
        bandwidths: Sequence[float] | None = None,
    ):
        if kernel not in ("polynomial", "gaussian"):
            raise ValueError(f"kernel={kernel!r} is unknown: choose 'polynomial' or 'gaussian'.")
        real = check_features(real_features, "real features", least=2).detach()
        self.kernel, self.unbiased = kernel, unbiased
        self.dtype = torch.float64 if real.numel() <= self.float64_elements else torch.float32
        self.dimension = real.shape[1]
        self._gamma = 1 / self.dimension
        self._centre = _mean_of_rows(real)  # (d,)
        self._base = self._gamma * self._centre.square().sum().item() + 1.0  # the polynomial's base at the centre
        self._real = self._rows(real)
        self.bandwidths: tuple[float, ...] = tuple(map(float, bandwidths or ()))
        if kernel == "gaussian" and bandwidths is None:
            self.bandwidths = self._median_heuristic()
        pairs, diagonal = self._sums_over_others(self._real).sum(), self._with_themselves(self._real).sum()
        self._real_term = self._mean_of_pairs(pairs, diagonal, len(real)).item()

    # ---- the distance ----

    def fit(self, features: Tensor) -> "KernelDistance":
        """Takes features `(N, d)` of any float dtype, N ≥ 2, as the reference set."""
        check_features(features, "reference features", self.dimension, least=2)
        self._centre, self._real = self._centre.to(features.device), self._real.to(features.device)
        own = self.reference_set = self._rows(features)
        cross = self._sums_over(own, self._real) / len(self._real)
        self._each = _Sums(self._sums_over_others(own), self._with_themselves(own), cross)  # each (N,)
        self._total = _Sums(*(part.sum() for part in self._each))
        self.value = self._distance(self._total, len(features)).item()
        return self

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """Distances `(B,)` after replacing rows, see [`~metrics.Distance.replaced`]."""
        total, _ = self._replacement(indices, features)
        return self._distance(total, len(self.reference_set))

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """Credit `(B, n)` of each new row, see [`~metrics.Distance.leave_one_in`]; N ≥ 3."""
        total, row = self._replacement(indices, features)
        whole, count = _Sums(*(part[:, None] for part in total)), len(self.reference_set)
        return self._distance(whole, count) - self._distance(whole.without(row), count - 1)

    @torch.no_grad()
    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Gradient `(B, n, d)` of `replaced` with respect to the new rows, see [`~metrics.Distance.gradient`].

        With `∂k(x, y)` the derivative in x, row x of the updated set g has the gradient

            2/N · [ mean_{g ≠ x} ∂k(x, g) - mean_r ∂k(x, r) ]      unbiased; biased: the mean over all g, x too

        where `∂k` is `3γ (γ x·y + 1)² · y` with γ = 1/d for the polynomial kernel, and the mean over bandwidths of
        `exp(-|x - y|² / 2σ²) (y - x) / σ²` for the Gaussian one.
        """
        subsets = zip(*check_replacement(indices, features, self.reference_set.centred), strict=True)
        return torch.stack([self._gradient_of_subset(rows, new) for rows, new in subsets])

    def delete_one(self, indices: Tensor) -> Tensor:
        """Change of the distance `(M,)` without row i of `indices`, see [`~metrics.Distance.delete_one`]; N ≥ 3."""
        count, rows = len(self.reference_set), indices.to(self._centre.device)
        without = self._total.without(_Sums(*(part[rows] for part in self._each)))
        return self._distance(without, count - 1) - self._distance(self._total, count)

    # ---- sums ----

    def _distance(self, sums: _Sums, count: int) -> Tensor:
        own = self._mean_of_pairs(sums.pairs, sums.diagonal, count)
        return own + self._real_term - 2 * sums.cross / count

    def _mean_of_pairs(self, pairs: Tensor, diagonal: Tensor, count: int) -> Tensor:
        return pairs / (count * (count - 1)) if self.unbiased else (pairs + diagonal) / count**2

    def _replacement(self, indices: Tensor, features: Tensor) -> tuple[_Sums, _Sums]:
        """Sums of each updated set, (B,), and of each new row in its updated set, (B, n)."""
        indices, features = check_replacement(indices, features, self.reference_set.centred)
        size = indices.shape[1]
        chunk = max(1, self.memory_budget // (8 * size * (6 * self.dimension + 12 * size)))
        pieces = zip(indices.split(chunk), features.split(chunk), strict=True)
        totals, rows = zip(*(self._replacement_chunk(*piece) for piece in pieces), strict=True)
        return _Sums(*map(torch.cat, zip(*totals, strict=True))), _Sums(*map(torch.cat, zip(*rows, strict=True)))

    def _replacement_chunk(self, indices: Tensor, features: Tensor) -> tuple[_Sums, _Sums]:
        flat = self._rows(features.flatten(0, 1))  # (B * n, d)
        over_set, over_real = self._sums_over(flat, self.reference_set), self._sums_over(flat, self._real)
        new = flat[torch.arange(len(flat), device=indices.device).view(indices.shape)].double()
        old = self.reference_set[indices].double()
        new_old = self._values(new, old)  # (B, n, n)
        new_new, old_old = self._values(new, new), self._values(old, old)
        for values in (new_new, old_old):
            values.diagonal(dim1=1, dim2=2).zero_()
        each = _Sums(
            over_set.view(indices.shape) - new_old.sum(dim=2) + new_new.sum(dim=2),
            self._with_themselves(new),
            over_real.view(indices.shape) / len(self._real),
        )
        gone = _Sums(*(part[indices].sum(dim=1) for part in self._each))
        # the rows' sums take pairs of removed rows out twice, and count pairs of new rows twice
        pairs = self._total.pairs - 2 * gone.pairs + old_old.sum((1, 2)) + 2 * each.pairs.sum(1) - new_new.sum((1, 2))
        diagonal = self._total.diagonal - gone.diagonal + each.diagonal.sum(1)
        return _Sums(pairs, diagonal, self._total.cross - gone.cross + each.cross.sum(1)), each

    def _gradient_of_subset(self, indices: Tensor, features: Tensor) -> Tensor:
        """Gradient (n, d) of one subset, with rows (n,) and features (n, d)."""
        new, count, number = self._rows(features), len(self.reference_set), len(self._real)
        kept = torch.ones(count, dtype=torch.float64, device=indices.device)
        kept[indices] = 0
        others = count - 1 if self.unbiased else count
        slopes = torch.zeros_like(new.term)  # (n,)
        gradient = torch.zeros(new.centred.shape, dtype=torch.float64, device=indices.device)
        self._add_slopes(gradient, slopes, new, self.reference_set, kept / others)
        self._add_slopes(gradient, slopes, new, new, torch.ones_like(new.term) / others, exclude_self=self.unbiased)
        self._add_slopes(gradient, slopes, new, self._real, torch.full_like(self._real.term, -1 / number))
        # the part that all slopes of a row share: y = z + centre (polynomial kernel), y - x (Gaussian kernel)
        gradient += slopes[:, None] * (-new.centred.double() if self.kernel == "gaussian" else self._centre)
        return gradient.mul_(2 / count)

    def _add_slopes(
        self, gradient: Tensor, slopes: Tensor, x: _Rows, y: _Rows, weights: Tensor, exclude_self: bool = False
    ) -> None:
        """Adds `Σ_y w_y s(x, y) y` to `gradient` (P, d) and `Σ_y w_y s(x, y)` to `slopes` (P,), for weights w (Q,)."""
        rows, columns = self._block(len(x), len(y))
        columns = min(columns, max(1, self.memory_budget // (32 * self.dimension)))  # y in float64
        for j in range(0, len(y), columns):
            part, weight, centred = y[j : j + columns], weights[j : j + columns], y.centred[j : j + columns].double()
            for i in range(0, len(x), rows):
                values = self._slopes(x[i : i + rows], part).mul_(weight)
                if exclude_self:
                    values.diagonal(offset=i - j).zero_()
                gradient[i : i + rows].addmm_(values, centred)
                slopes[i : i + rows] += values.sum(dim=1)

    def _sums_over(self, x: _Rows, y: _Rows) -> Tensor:
        """Σ_y k(x, y) for each row of x, (P,), block by block."""
        rows, columns = self._block(len(x), len(y))
        sums = torch.zeros_like(x.term)
        for i in range(0, len(x), rows):
            for j in range(0, len(y), columns):
                sums[i : i + rows] += self._values(x[i : i + rows], y[j : j + columns]).sum(dim=1)
        return sums

    def _sums_over_others(self, x: _Rows) -> Tensor:
        """Σ_{j≠i} k(x_i, x_j) for each row i, (P,): half of the blocks suffice, as k is symmetric."""
        size, _ = self._block(len(x), len(x))
        sums = torch.zeros_like(x.term)
        for i in range(0, len(x), size):
            for j in range(i, len(x), size):
                values = self._values(x[i : i + size], x[j : j + size])
                if i == j:
                    values.fill_diagonal_(0)
                else:
                    sums[j : j + size] += values.sum(dim=0)
                sums[i : i + size] += values.sum(dim=1)
        return sums

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        area = max(self.memory_budget // 40, 64)  # inner products in two dtypes and work space of the kernel
        height = min(rows, math.isqrt(area)) or 1
        return height, max(1, min(columns, area // height))

    # ---- the kernel ----

    def _rows(self, features: Tensor) -> _Rows:
        """Rows about the centre. Blocked: perhaps only a float32 copy of the set fits."""
        size = max(1, self.memory_budget // (64 * features.shape[1]))
        centred = torch.empty(features.shape, dtype=self.dtype, device=features.device)
        square, term = torch.empty(2, len(features), dtype=torch.float64, device=features.device)
        for start in range(0, len(features), size):
            block = slice(start, start + size)
            centred[block] = features[block].detach().double() - self._centre
            wide = centred[block].double()
            square[block], term[block] = wide.square().sum(1), self._gamma * (wide @ self._centre)
        return _Rows(centred, square, square if self.kernel == "gaussian" else term)

    def _values(self, x: _Rows, y: _Rows) -> Tensor:
        """k(x, y) - k₀ of all pairs, (..., P, Q) float64."""
        arguments = self._arguments(x, y)
        return self._gaussian(arguments) if self.kernel == "gaussian" else self._polynomial(arguments)

    def _slopes(self, x: _Rows, y: _Rows) -> Tensor:
        """Factor of y (Gaussian kernel: of y - x) in the derivative of k(x, y) with respect to x, (P, Q)."""
        arguments = self._arguments(x, y)
        if self.kernel == "polynomial":
            return arguments.add_(self._base).pow_(2).mul_(3 * self._gamma)
        values = torch.zeros_like(arguments.clamp_(min=0))
        for bandwidth in self.bandwidths:
            values += (arguments * (-0.5 / bandwidth**2)).exp_().div_(bandwidth**2)
        return values.div_(len(self.bandwidths))

    def _arguments(self, x: _Rows, y: _Rows) -> Tensor:
        """Arguments of the kernel: γ x·y minus its value at the centre, or |x - y|²; (..., P, Q) float64."""
        with full_precision():
            products = (x.centred @ y.centred.mT).double()
        factor = -2 if self.kernel == "gaussian" else self._gamma
        return products.mul_(factor).add_(x.term[..., :, None]).add_(y.term[..., None, :])

    def _with_themselves(self, x: _Rows) -> Tensor:
        """k(x, x) - k₀ of each row, (..., P) float64."""
        zero = torch.zeros_like(x.term)
        return zero if self.kernel == "gaussian" else self._polynomial(self._gamma * x.square + 2 * x.term)

    def _polynomial(self, change: Tensor) -> Tensor:
        """(a + v)³ - a³ by Horner's rule, with a the base at the centre and v its change."""
        return (change + 3 * self._base).mul_(change).add_(3 * self._base**2).mul_(change)

    def _gaussian(self, squared_distances: Tensor) -> Tensor:
        """Mean over bandwidths of exp(-|x - y|² / 2σ²) - 1; rounding can leave a distance just below zero."""
        values = torch.zeros_like(squared_distances.clamp_(min=0))
        for bandwidth in self.bandwidths:
            values += (squared_distances * (-0.5 / bandwidth**2)).expm1_()
        return values.div_(len(self.bandwidths))

    def _median_heuristic(self) -> tuple[float, ...]:
        """The median distance between rows (Gretton et al., JMLR 2012, Sec. 8), half and twice of it."""
        rows = self._real.centred
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), 2_000), dtype=torch.float64).round().long()
        median = torch.pdist(rows[chosen.to(rows.device)].double()).median().item()
        if median == 0:
            raise ValueError("the median distance between real rows is 0, too many are equal: pass bandwidths=(…).")
        return (0.5 * median, median, 2 * median)


def _mean_of_rows(features: Tensor) -> Tensor:
    """Mean `(d,)` in float64; torch's own first copies all rows to float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in features.split(4096):
        total += block.sum(dim=0, dtype=torch.float64)
    return total / len(features)
