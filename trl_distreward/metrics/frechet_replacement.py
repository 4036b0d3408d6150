# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distances after replacing rows of a set, from log-determinants: one eigendecomposition per reference set.

Replacing n rows changes `A = S_r^½ S S_r^½` by a term of rank 2n + 1. The change of `Tr A^½` is an integral of
log-determinants of that size, see `quadrature.py` and `logdet.py`.
"""

import math

import torch
from torch import Tensor

from .frechet_eigenvalues import FittedSet, Move, clean
from .logdet import Factors, ShiftedGrams, eigenvalues_above, factorize, whitened_resolvents
from .precision import full_precision
from .quadrature import Quadrature, elliptic_quadrature

ROUNDING = 1e-8  # resolution of square roots of eigenvalues, relative to the largest
CHECK_TOLERANCE = 1e-5  # largest difference of coarse and fine rule by rounding, relative to the movement of the trace


class LogDeterminants:
    """Changes of the Fréchet distance of one fitted set, in the eigenbasis of its A."""

    def __init__(self, own: FittedSet):
        self.own = own
        eigenvalues, vectors = torch.linalg.eigh(own.product)
        self.eigenvalues = clean(eigenvalues, own.rank_of(own.count))  # Λ of A, (d,), ascending
        # P = Λ^-½ QᵀR, (d, d): features to the whitened basis; rows of the eigenvalue 0 stay undivided
        scale = torch.where(self.eigenvalues > 0, self.eigenvalues, 1.0).sqrt()
        self.projection = vectors.mT @ own.real.root / scale[:, None]
        with full_precision():
            self.rows = own.rows @ self.projection.mT  # Y = Z Pᵀ, (N, d)
        positive = self.eigenvalues[self.eigenvalues > 0]
        self.smallest = positive[0].sqrt().item() if len(positive) else 0.0
        self._quadratures: dict[tuple[int, bool], tuple[Quadrature, ShiftedGrams]] = {}

    @property
    def root_trace(self) -> Tensor:
        return self.eigenvalues.sqrt().sum()

    def changed(
        self, indices: Tensor, features: Tensor, leave_one_in: bool, memory_budget: int
    ) -> tuple[Tensor, Tensor]:
        """Distances `(B,)` or credits `(B, n)`, and whether each subset failed `(B,)` and cannot be trusted."""
        size = indices.shape[1]
        pieces = features.split(max(1, 2**20 // (size * features.shape[2])))
        rule, grams = self._quadrature(max(self._rise(part) for part in pieces))
        chunk = max(1, memory_budget // grams.bytes_per_subset(2 * size + 1))
        changes = [
            self._change(idx, new, rule, grams, leave_one_in)
            for idx, new in zip(indices.split(chunk), features.split(chunk), strict=True)
        ]
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
        rule, _ = self._quadrature(0.0, full_range=True)
        scales = whitened_resolvents(self.eigenvalues, rule.nodes.to(own.mean.device) ** 2)
        forms = projected.square() @ scales.T  # (M, J)
        logs = torch.log1p((-ratio * forms).clamp(min=-1 + 1e-15))
        new_roots = growth**0.5 * (self.root_trace + logs @ rule.weights.to(own.mean.device))
        mean_term = -2 * (centred @ (own.mean - own.real.mean)) / (count - 1) + squares / (count - 1) ** 2
        return mean_term + (growth - 1) * own.trace - growth * ratio * squares - 2 * (new_roots - self.root_trace)

    def _rise(self, features: Tensor) -> float:
        """Largest possible rise of an eigenvalue of A when `features` `(B, n, d)` are added."""
        squares = (features.double() - self.own.mean).square().sum((1, 2)).max().item()
        return squares * self.own.real.largest / (self.own.count - 1)

    def _quadrature(self, rise: float, full_range: bool = False) -> tuple[Quadrature, ShiftedGrams]:
        """
        The rule for changes that raise no eigenvalue of A by more than `rise`, and grams at `-lower²` and its nodes.
        The upper end grows in octaves: rules are reused, and a subset's value does not depend on its neighbours.
        Below, half of the smallest root leaves room for removed rows; `full_range` goes down to rounding.
        """
        largest = self.eigenvalues[-1].item() or 1e-30
        octaves = math.ceil(math.log2(1 + rise / largest))
        key = (octaves, full_range)
        if key not in self._quadratures:
            upper = (largest * 2**octaves) ** 0.5
            floor = ROUNDING * upper
            lower = floor if full_range else max(self.smallest / 2, floor)
            rule = elliptic_quadrature(lower, upper)
            shifts = torch.cat([rule.nodes.new_tensor([-lower]), rule.nodes]).to(self.eigenvalues.device)
            self._quadratures[key] = rule, ShiftedGrams(self.eigenvalues, shifts * shifts.abs())
        return self._quadratures[key]

    def _change(
        self, indices: Tensor, features: Tensor, rule: Quadrature, shifted: ShiftedGrams, leave_one_in: bool
    ) -> tuple[Tensor, Tensor]:
        own, count, size = self.own, self.own.count, indices.shape[1]
        move = own.move(indices, features)
        # A' - A = W₊ᵀW₊ - W₋ᵀW₋ in the eigenbasis, with the shift of the mean as the last row of W₋
        with full_precision():
            y_added, y_removed = move.added @ self.projection.mT, self.rows[indices]
            y_shift = (y_added.sum(1) - y_removed.sum(1)) / count**0.5
            rows = torch.cat([y_added, y_removed, y_shift[:, None]], dim=1) / (count - 1) ** 0.5
            grams = shifted(rows)  # (1 + J, B, 2n + 1, 2n + 1), J the number of nodes
        factors = factorize(grams[1:], size)
        weights, coarse = rule.weights.to(rows.device), rule.coarse.to(rows.device)
        rise, fall = weights @ factors.rise, weights @ factors.fall
        root_trace = self.root_trace + rise - fall

        # Trusted if the premises of the bound hold: no eigenvalue fell out of the rule's interval, and the coarse rule
        # is as near as its own bound says.
        movement = rise + fall
        difference = (rise - fall - coarse @ (factors.rise - factors.fall)).abs()
        trusted = difference <= (rule.bound + rule.coarse_bound + CHECK_TOLERANCE) * movement + 1e-12 * own.trace
        if rule.lower > ROUNDING * rule.upper:
            trusted &= eigenvalues_above(grams[0], size)
        failed = factors.failed.any(0) | ~trusted
        if leave_one_in:
            return self._credits(move, root_trace, factors, rule), failed
        return own.distance(move.offset, move.trace, root_trace), failed

    def _credits(self, move: Move, root_trace: Tensor, factors: Factors, rule: Quadrature) -> Tensor:
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
