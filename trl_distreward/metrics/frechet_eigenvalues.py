# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A reference set beside real data, and Fréchet distances of changed sets from eigenvalues of whole matrices."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import FeatureStatistics


def clean(eigenvalues: Tensor, rank: int | None) -> Tensor:
    """
    Ascending eigenvalues with those below zero, and those beyond the rank, set to 0: rounding leaves about 1e-16 of
    the largest, whose square root is 1e-8 of that root, and hundreds of them spoil the sixth digit of the trace.
    """
    eigenvalues = eigenvalues.clamp(min=0)
    if rank is not None and rank < eigenvalues.shape[-1]:
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
    """Changes of a set by replacing n rows, for each of B subsets; float64."""

    added: Tensor  # new rows about the old mean, (B, n, d)
    removed: Tensor  # old rows about the old mean, (B, n, d)
    shift: Tensor  # of the mean, (B, d)
    offset: Tensor  # new mean minus the real one, (B, d)
    trace: Tensor  # of the new covariance, (B,)


@dataclass
class FittedSet:
    """A reference set beside real data; all float64."""

    rows: Tensor  # (N, d), about their mean
    mean: Tensor  # (d,)
    trace: Tensor  # of the set's covariance S
    product: Tensor  # A = R S R, (d, d)
    real: RealRoot

    @classmethod
    def from_features(cls, features: Tensor, real: RealRoot) -> "FittedSet":
        """The set of `features` `(N, d)`, float64, on the same device as `real`."""
        mean = features.mean(dim=0)
        centred = torch.empty_like(features)  # about the mean, so that products do not cancel
        scatter = features.new_zeros(features.shape[1], features.shape[1])
        for rows, kept in zip(features.split(4096), centred.split(4096), strict=True):
            rows = rows - mean
            scatter.addmm_(rows.T, rows)
            kept.copy_(rows)
        covariance = scatter / (len(features) - 1)
        return cls(centred, mean, covariance.trace(), symmetric(real.root @ covariance @ real.root), real)

    @property
    def count(self) -> int:
        return len(self.rows)

    def rank_of(self, count: int) -> int:
        """Largest possible rank of A for a set of `count` rows."""
        return min(count - 1, self.real.rank, self.rows.shape[1])

    def replaced(self, indices: Tensor, features: Tensor, leave_one_in: bool = False) -> Tensor:
        """Distances `(B,)`, or credits `(B, n)` with `leave_one_in`, from each changed product."""
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
        count, added, removed = self.count, features.double() - self.mean, self.rows[indices]
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

    def distance(self, mean: Tensor, trace: Tensor, root_trace: Tensor) -> Tensor:
        """Distance from the difference of means, `Tr S` and `Tr A^½`."""
        return mean.square().sum(-1) + trace + self.real.trace - 2 * root_trace
