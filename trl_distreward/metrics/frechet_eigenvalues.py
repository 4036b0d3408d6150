# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What takes the eigenvalues of a whole matrix: square roots, and distances of a changed set with their gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import FeatureStatistics


def symmetric_sqrt(matrix: Tensor, rank: int | None = None) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix, keeping at most the `rank` largest eigenvalues."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * clean(eigenvalues, rank).sqrt()) @ eigenvectors.mT


def clean(eigenvalues: Tensor, rank: int | None) -> Tensor:
    """Ascending eigenvalues with rounding noise removed: below zero, and beyond what the rank allows, they are 0.

    Left in, a zero eigenvalue of a rank-deficient covariance returns as about 1e-16 of the largest, whose square root
    is 1e-8 of it: with hundreds of them the trace is wrong in the sixth digit.
    """
    eigenvalues = eigenvalues.clamp(min=0)
    if rank is not None and rank < eigenvalues.shape[-1]:
        eigenvalues[..., : eigenvalues.shape[-1] - rank] = 0
    return eigenvalues


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


@dataclass
class FittedSet:
    """
    A reference set beside real data: what its Fréchet distance is made of, and that of every set a few rows away.

    Args:
        rows (`torch.Tensor` of shape `(N, d)`): about their mean, float32 or float64; the rest is float64.
        mean (`torch.Tensor` of shape `(d,)`), trace (`torch.Tensor`): of the set; the trace is its covariance's.
        product (`torch.Tensor` of shape `(d, d)`): `A = R S R`, with its covariance S.
        root (`torch.Tensor` of shape `(d, d)`): `R`, the root of the real covariance.
        real_mean (`torch.Tensor` of shape `(d,)`), real_trace (`torch.Tensor`): of the real data.
        real_rank (`int`): the most that the rank of R can be.
    """

    rows: Tensor
    mean: Tensor
    trace: Tensor
    product: Tensor
    root: Tensor
    real_mean: Tensor
    real_trace: Tensor
    real_rank: int

    @classmethod
    def of(cls, features: Tensor, real: FeatureStatistics, root: Tensor, dtype: torch.dtype) -> "FittedSet":
        """
        The set of `features` `(N, d)`, float64, beside `real`, whose covariance has the root `root`; rows are kept in
        `dtype` unless the set is rank-deficient.
        """
        count, dimension = features.shape
        # A rank-deficient A is ill-posed in float32: new rows that leave its range meet shifts near 0.
        dtype = dtype if min(count - 1, real.rank_bound) >= dimension else torch.float64
        mean = features.mean(dim=0)
        centred = torch.empty_like(features, dtype=dtype)  # about the mean, so that products do not cancel
        scatter = features.new_zeros(dimension, dimension)
        for rows, kept in zip(features.split(4096), centred.split(4096), strict=True):
            rows = rows - mean
            scatter.addmm_(rows.T, rows)
            kept.copy_(rows)
        covariance = scatter / (count - 1)
        return cls(
            rows=centred,
            mean=mean,
            trace=covariance.trace(),
            product=symmetric(root @ covariance @ root),
            root=root,
            real_mean=real.mean.to(features.device),
            real_trace=real.covariance.trace().to(features.device),
            real_rank=real.rank_bound,
        )

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def offset(self) -> Tensor:
        """From the real mean to the set's, `(d,)`."""
        return self.mean - self.real_mean

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def rank(self) -> int:
        """The most that the rank of A can be."""
        return self.rank_of(self.count)

    def rank_of(self, count: int) -> int:
        """The same for a set of `count` rows."""
        return min(count - 1, self.real_rank, self.rows.shape[1])

    def direct(self, indices: Tensor, features: Tensor, leave_one_in: bool = False) -> Tensor:
        """[`~FrechetDistance.replaced`], or [`~FrechetDistance.leave_one_in`], from each changed product."""
        count = self.count
        added, removed, shift = self.moved(indices, features)
        added_r, shift_r = added @ self.root, shift @ self.root
        product = self.updated_product(added_r.mT @ added_r, removed, shift_r)
        squares = added.square().sum((1, 2)) - removed.square().sum((1, 2)) - count * shift.square().sum(1)
        mean, trace = self.mean + shift - self.real_mean, self.trace + squares / (count - 1)
        distance = self.distance(mean, trace, self.root_trace(product))
        if not leave_one_in:
            return distance
        ratio, growth, rank = count / (count - 1) ** 2, (count - 1) / (count - 2), self.rank_of(count - 1)
        credits = []
        for j in range(indices.shape[1]):
            z, y = added[:, j] - shift, added_r[:, j] - shift_r
            roots = self.root_trace(growth * (product - ratio * y[:, :, None] * y[:, None, :]), rank)
            rest = growth * (trace - ratio * z.square().sum(1))
            credits.append(distance - self.distance(mean - z / (count - 1), rest, roots))
        return torch.stack(credits, dim=1)

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """[`~FrechetDistance.gradient`]."""
        count = self.count
        added, removed, shift = self.moved(indices, features)
        added_r = added @ self.root
        gain = added_r.mT @ added_r
        # A' ≤ A + gain / (N - 1): their rounding is what a zero eigenvalue of A' comes back as. Its rows hold rounding
        # too, and one divided by the root of the other would cost half of the digits, or all of them by bad luck.
        largest = torch.linalg.matrix_norm(self.product) + torch.linalg.matrix_norm(gain) / (count - 1)  # (B,)
        product = self.updated_product(gain, removed, shift @ self.root)
        eigenvalues, vectors = torch.linalg.eigh(product)
        eigenvalues = clean(eigenvalues, self.rank)
        zero = eigenvalues <= self.rows.shape[1] * torch.finfo(torch.float64).eps * largest[:, None]
        scales = eigenvalues.masked_fill(zero, torch.inf) ** -0.25  # (B, d), 0 for eigenvalues 0
        half = scales[:, :, None] * (vectors.mT @ self.root)  # G = I - halfᵀ half
        rows = added - shift[:, None]
        mean = self.mean + shift - self.real_mean
        return 2 / (count - 1) * (rows - rows @ half.mT @ half) + 2 / count * mean[:, None]

    def moved(self, indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Added and removed rows about the old mean, (B, n, d), and how far the mean moves, (B, d); float64."""
        added, removed = features.double() - self.mean, self.rows[indices].double()
        return added, removed, (added.sum(dim=1) - removed.sum(dim=1)) / self.count

    def updated_product(self, gain: Tensor, removed: Tensor, shift_r: Tensor) -> Tensor:
        """A' (B, d, d), from the added rows' scatter times R on both sides, removed rows, and the mean's shift · R."""
        removed_r = removed @ self.root
        change = gain - removed_r.mT @ removed_r - self.count * shift_r[:, :, None] * shift_r[:, None, :]
        return self.product + change / (self.count - 1)

    def root_trace(self, product: Tensor, rank: int | None = None) -> Tensor:
        return clean(torch.linalg.eigvalsh(product), self.rank if rank is None else rank).sqrt().sum(-1)

    def distance(self, mean: Tensor, trace: Tensor, root_trace: Tensor) -> Tensor:
        """From the means' difference and the traces of `S` and `A^½`."""
        return mean.square().sum(-1) + trace + self.real_trace - 2 * root_trace
