# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Exact Fréchet distances of a set from real data after replacing rows of the set.

With `R = S_r^½` the distance needs `Tr A^½` of `A = R S R`. Replacing n rows changes A by a term of rank 2n + 1. The
new trace comes from the eigenvalues of the changed A ([`FittedSet`]), or from log-determinants of size 2n + 1 in the
eigenbasis of the old one ([`LogDeterminants`]), which need one eigendecomposition per set, see `logdet.py`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import logdet
from .precision import full_precision
from .statistics import FeatureStatistics

ROUNDING = 1e-8  # resolution of square roots of eigenvalues, relative to the largest
CHECK_TOLERANCE = 1e-5  # largest difference of coarse and fine rule by rounding, relative to the movement of the trace


def clean(eigenvalues: Tensor, rank: int) -> Tensor:
    """
    Ascending eigenvalues with those below zero, and those beyond the rank, set to 0: rounding leaves about 1e-16 of
    the largest, whose square root is 1e-8 of that root, and hundreds of them spoil the sixth digit of the trace.
    """
    eigenvalues = eigenvalues.clamp(min=0)
    eigenvalues[..., : eigenvalues.shape[-1] - rank] = 0
    return eigenvalues


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


@dataclass
class RealRoot:
    """The real data's side of the distance: `R = S_r^½` and the moments, float64."""

    mean: Tensor  # (d,)
    trace: Tensor  # of S_r
    root: Tensor  # R, (d, d)
    largest: float  # eigenvalue of S_r
    rank: int  # largest possible rank of S_r

    @classmethod
    def of(cls, real: FeatureStatistics) -> "RealRoot":
        values, vectors = torch.linalg.eigh(real.covariance)
        values = clean(values, real.rank_bound)
        root = (vectors * values.sqrt()) @ vectors.mT
        return cls(real.mean, real.covariance.trace(), root, values[-1].item(), real.rank_bound)

    def to(self, device: torch.device) -> "RealRoot":
        return RealRoot(self.mean.to(device), self.trace.to(device), self.root.to(device), self.largest, self.rank)


class Move(NamedTuple):
    """Changes of a set by replacing n rows, for each of B subsets."""

    added: Tensor  # new rows about the old mean, (B, n, d)
    removed: Tensor  # old rows about the old mean, (B, n, d)
    shift: Tensor  # of the mean, (B, d)
    offset: Tensor  # new mean minus the real one, (B, d)
    trace: Tensor  # of the new covariance, (B,)


class FittedSet:
    """A reference set `(N, d)`, float64, beside real data on the same device."""

    def __init__(self, features: Tensor, real: RealRoot):
        self.real, self.count = real, len(features)
        self.mean = features.mean(dim=0)
        self.rows = torch.empty_like(features)  # about the mean, so that products do not cancel
        scatter = features.new_zeros(features.shape[1], features.shape[1])
        for rows, kept in zip(features.split(4096), self.rows.split(4096), strict=True):
            rows = rows - self.mean
            scatter.addmm_(rows.T, rows)
            kept.copy_(rows)
        covariance = scatter / (self.count - 1)
        self.trace = covariance.trace()
        self.product = symmetric(real.root @ covariance @ real.root)  # A, (d, d)

    def rank_of(self, count: int) -> int:
        """Largest possible rank of A for a set of `count` rows."""
        return min(count - 1, self.real.rank, self.rows.shape[1])

    def replaced(self, indices: Tensor, features: Tensor, leave_one_in: bool = False) -> Tensor:
        """Distances `(B,)`, or credits `(B, n)` with `leave_one_in`, from the eigenvalues of each changed A."""
        count, move = self.count, self.move(indices, features)
        added_r, shift_r = move.added @ self.real.root, move.shift @ self.real.root
        product = self.updated_product(added_r.mT @ added_r, move.removed, shift_r)
        distance = self.distance(move.offset, move.trace, self.root_trace(product, self.rank_of(count)))
        if not leave_one_in:
            return distance
        ratio, growth, rank = count / (count - 1) ** 2, (count - 1) / (count - 2), self.rank_of(count - 1)
        credits = []
        for j in range(indices.shape[1]):
            z, y = move.added[:, j] - move.shift, added_r[:, j] - shift_r
            roots = self.root_trace(growth * (product - ratio * y[:, :, None] * y[:, None, :]), rank)
            rest = growth * (move.trace - ratio * z.square().sum(1))
            credits.append(distance - self.distance(move.offset - z / (count - 1), rest, roots))
        return torch.stack(credits, dim=1)

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """Gradient `(B, n, d)`, see [`~FrechetDistance.gradient`]."""
        count, move = self.count, self.move(indices, features)
        added_r = move.added @ self.real.root
        gain = added_r.mT @ added_r
        # A' ≤ A + gain / (N - 1): a zero eigenvalue of A' comes back as the rounding of these two. The rows hold
        # rounding too, and one divided by the root of the other would cost half of the digits or all of them.
        largest = torch.linalg.matrix_norm(self.product) + torch.linalg.matrix_norm(gain) / (count - 1)  # (B,)
        eigenvalues, vectors = torch.linalg.eigh(self.updated_product(gain, move.removed, move.shift @ self.real.root))
        eigenvalues = clean(eigenvalues, self.rank_of(count))
        zero = eigenvalues <= self.rows.shape[1] * torch.finfo(torch.float64).eps * largest[:, None]
        scales = eigenvalues.masked_fill(zero, torch.inf) ** -0.25  # (B, d), 0 for eigenvalues 0
        half = scales[:, :, None] * (vectors.mT @ self.real.root)  # G = I - halfᵀ half
        rows = move.added - move.shift[:, None]
        return 2 / (count - 1) * (rows - rows @ half.mT @ half) + 2 / count * move.offset[:, None]

    def move(self, indices: Tensor, features: Tensor) -> Move:
        count, added, removed = self.count, features - self.mean, self.rows[indices]
        shift = (added.sum(dim=1) - removed.sum(dim=1)) / count
        squares = added.square().sum((1, 2)) - removed.square().sum((1, 2)) - count * shift.square().sum(1)
        return Move(added, removed, shift, self.mean + shift - self.real.mean, self.trace + squares / (count - 1))

    def updated_product(self, gain: Tensor, removed: Tensor, shift_r: Tensor) -> Tensor:
        """A' (B, d, d) from the added rows' scatter between two R, the removed rows, and the mean's shift times R."""
        removed_r = removed @ self.real.root
        change = gain - removed_r.mT @ removed_r - self.count * shift_r[:, :, None] * shift_r[:, None, :]
        return self.product + change / (self.count - 1)

    def root_trace(self, product: Tensor, rank: int) -> Tensor:
        return clean(torch.linalg.eigvalsh(product), rank).sqrt().sum(-1)

    def distance(self, offset: Tensor, trace: Tensor, root_trace: Tensor) -> Tensor:
        """Distance from the difference of means, `Tr S` and `Tr A^½`."""
        return offset.square().sum(-1) + trace + self.real.trace - 2 * root_trace


Rule = tuple[logdet.Quadrature, logdet.ShiftedGrams]  # grams at -lower² and at the nodes


class LogDeterminants:
    """Changes of the distance of one fitted set, in the eigenbasis of its A."""

    def __init__(self, own: FittedSet):
        self.own = own
        eigenvalues, vectors = torch.linalg.eigh(own.product)
        self.eigenvalues = clean(eigenvalues, own.rank_of(own.count))  # Λ of A, (d,), ascending
        # features that do not vary in the set leave eigenvalues of mere rounding: rows divided by them are noise
        rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * self.eigenvalues[-1]
        self.eigenvalues[self.eigenvalues <= rounding] = 0
        # P = Λ^-½ QᵀR, (d, d): features to the whitened basis; rows of the eigenvalue 0 stay undivided
        scale = torch.where(self.eigenvalues > 0, self.eigenvalues, 1.0).sqrt()
        self.projection = vectors.mT @ own.real.root / scale[:, None]
        with full_precision():
            self.rows = own.rows @ self.projection.mT  # Y = Z Pᵀ, (N, d)
        self.root_trace = self.eigenvalues.sqrt().sum()
        self.largest = self.eigenvalues[-1].item() or 1e-30
        self._rules: dict[int, Rule] = {}

    def changed(
        self, indices: Tensor, features: Tensor, leave_one_in: bool, memory_budget: int
    ) -> tuple[Tensor, Tensor]:
        """Distances `(B,)` or credits `(B, n)`, and whether each subset failed `(B,)` and cannot be trusted."""
        own, size = self.own, indices.shape[1]
        pieces = features.split(max(1, 2**20 // (size * features.shape[2])))
        squares = max((part - own.mean).square().sum((1, 2)).max().item() for part in pieces)
        rule = self._rule(squares * own.real.largest / (own.count - 1))
        chunk = max(1, memory_budget // rule[1].bytes_per_subset(2 * size + 1))
        subsets = zip(indices.split(chunk), features.split(chunk), strict=True)
        changes = [self._change(idx, new, rule, leave_one_in) for idx, new in subsets]
        results, failed = zip(*changes, strict=True)
        return torch.cat(results), torch.cat(failed)

    def delete_one(self, indices: Tensor) -> Tensor:
        """Changes of the distance `(M,)` without each of some rows."""
        own, count = self.own, self.own.count
        centred, projected = own.rows[indices], self.rows[indices]
        ratio = count / ((count - 1) * (count - 1))  # c: A' = growth · (A - c · yyᵀ)
        growth = (count - 1) / (count - 2)
        squares = centred.square().sum(1)
        # One row may empty a direction: the rule goes down to rounding, as a node costs only one column here.
        rule = logdet.elliptic_quadrature(ROUNDING * self.largest**0.5, self.largest**0.5)
        scales = logdet.whitened_resolvents(self.eigenvalues, rule.nodes.to(own.mean.device) ** 2)
        forms = projected.square() @ scales.T  # (M, J)
        logs = torch.log1p((-ratio * forms).clamp(min=-1 + 1e-15))
        new_roots = growth**0.5 * (self.root_trace + logs @ rule.weights.to(own.mean.device))
        mean_term = -2 * (centred @ (own.mean - own.real.mean)) / (count - 1) + squares / (count - 1) ** 2
        return mean_term + (growth - 1) * own.trace - growth * ratio * squares - 2 * (new_roots - self.root_trace)

    def _rule(self, rise: float) -> Rule:
        """
        The rule for changes that raise no eigenvalue of A by more than `rise`. The upper end grows in octaves: rules
        are reused, and a subset's value does not depend on its neighbours. Below, half of the smallest root leaves
        room for removed rows.
        """
        octaves = math.ceil(math.log2(1 + rise / self.largest))
        if octaves not in self._rules:
            upper = (self.largest * 2**octaves) ** 0.5
            positive = self.eigenvalues[self.eigenvalues > 0]
            smallest = positive[0].sqrt().item() if len(positive) else 0.0
            rule = logdet.elliptic_quadrature(max(smallest / 2, ROUNDING * upper), upper)
            shifts = torch.cat([rule.nodes.new_tensor([-rule.lower]), rule.nodes]).to(self.eigenvalues.device)
            self._rules[octaves] = rule, logdet.ShiftedGrams(self.eigenvalues, shifts * shifts.abs())
        return self._rules[octaves]

    def _change(self, indices: Tensor, features: Tensor, rule: Rule, leave_one_in: bool) -> tuple[Tensor, Tensor]:
        own, count, size = self.own, self.own.count, indices.shape[1]
        quadrature, shifted = rule
        move = own.move(indices, features)
        # A' - A = W₊ᵀW₊ - W₋ᵀW₋ in the eigenbasis, with the shift of the mean as the last row of W₋
        with full_precision():
            y_added, y_removed = move.added @ self.projection.mT, self.rows[indices]
            y_shift = (y_added.sum(1) - y_removed.sum(1)) / count**0.5
            rows = torch.cat([y_added, y_removed, y_shift[:, None]], dim=1) / (count - 1) ** 0.5
            grams = shifted(rows)  # (1 + J, B, 2n + 1, 2n + 1), J the number of nodes
        factors = logdet.factorize(grams[1:], size)
        weights, coarse = quadrature.weights.to(rows.device), quadrature.coarse.to(rows.device)
        rise, fall = weights @ factors.rise, weights @ factors.fall
        root_trace = self.root_trace + rise - fall

        # Trusted if the premises of the bound hold: no eigenvalue fell out of the rule's interval, and the coarse rule
        # is as near as its own bound says.
        difference = (rise - fall - coarse @ (factors.rise - factors.fall)).abs()
        tolerance = (quadrature.bound + quadrature.coarse_bound + CHECK_TOLERANCE) * (rise + fall) + 1e-12 * own.trace
        trusted = (difference <= tolerance) & ~factors.failed.any(0)
        if quadrature.lower > ROUNDING * quadrature.upper:
            trusted &= logdet.eigenvalues_above(grams[0], size)
        if leave_one_in:
            return self._credits(move, root_trace, factors, quadrature), ~trusted
        return own.distance(move.offset, move.trace, root_trace), ~trusted

    def _credits(self, move: Move, root_trace: Tensor, factors: logdet.Factors, rule: logdet.Quadrature) -> Tensor:
        """
        `D(G') - D(G' without row j)` for new rows about the new mean, z'.

        With `c = N/(N - 1)²` the change of `Tr A'^½` needs `1 - c y'ᵀ(A' + s²)⁻¹y'`. By Woodbury this is
        `c · uᵀ(C + M)⁻¹u` with `u = √(N - 1) (e_j + e_shift/√N)`: the 1 cancels on paper, not in floating point.
        """
        own, count = self.own, self.own.count
        rows = move.added - move.shift[:, None]  # (B, n, d)
        size = rows.shape[1]
        ratio, growth = count / (count - 1) ** 2, (count - 1) / (count - 2)
        unit = torch.eye(size, dtype=torch.float64, device=rows.device) * (count - 1) ** 0.5
        tail = unit.new_zeros(size + 1, size)
        tail[-1] = ((count - 1) / count) ** 0.5
        shape = factors.failed.shape
        forms = factors.inverse_forms(unit.expand(*shape, size, size), tail.expand(*shape, size + 1, size))
        logs = (ratio * forms).clamp(min=1e-30).log()  # (J, B, n)
        weights, nodes = rule.weights.to(logs.device), rule.nodes.to(logs.device)[:, None, None]
        emptied = 0.0
        if own.rank_of(count - 1) < own.rank_of(count):
            # one eigenvalue becomes exactly 0, below any interval: let it end inside, and take the rest analytically
            emptied = 2 * rule.lower
            logs = logs - (nodes**2 / (emptied**2 + nodes**2)).log()
        fallen = torch.tensordot(weights, logs, 1) - emptied
        squares = rows.square().sum(2)  # (B, n)
        mean_term = squares / (count - 1) ** 2 - 2 * (rows @ move.offset[:, :, None])[..., 0] / (count - 1)
        trace_term = (growth - 1) * move.trace[:, None] - growth * ratio * squares
        root_term = (growth**0.5 - 1) * root_trace[:, None] + growth**0.5 * fallen
        return 2 * root_term - mean_term - trace_term
