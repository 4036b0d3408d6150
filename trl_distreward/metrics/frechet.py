# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance between Gaussians, and its exact value after replacing rows of a set.

With mean `m`, covariance `S` of the generated features and `m_r`, `S_r` of the real ones (Dowson and Landau, 1982):

    FD = |m - m_r|² + Tr S + Tr S_r - 2 Tr (S_r^½ S S_r^½)^½
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_features, check_replacement
from .frechet_replacement import FittedSet, LogDeterminants, RealRoot, clean, symmetric
from .statistics import FeatureStatistics


def frechet_distance(generated: FeatureStatistics, real: FeatureStatistics, root: RealRoot | None = None) -> float:
    """Fréchet distance of two sets; FID with Inception-v3. `root`, half of the work, is `RealRoot.of(real)`."""
    side, covariance = (root or RealRoot.of(real)).to(generated.mean.device), generated.covariance
    rank = min(generated.rank_bound, real.rank_bound)
    spectrum = clean(torch.linalg.eigvalsh(symmetric(side.root @ covariance @ side.root)), rank)
    mean_term = (generated.mean - side.mean).square().sum()
    distance = mean_term + covariance.trace() + side.trace - 2 * spectrum.sqrt().sum()
    return max(distance.item(), 0.0)


class FrechetDistance:
    """
    Fréchet distance of a reference set from `real` data, and its exact values after some of its rows are replaced.

    Each reference set costs one eigendecomposition, each subset log-determinants of size 2n + 1 with an error of about
    1e-8 of the distance, or the eigenvalues of the changed matrix if the error bound fails. All arithmetic is float64.
    `method` is `"logdet"`; `"direct"`, the eigenvalues of every changed matrix, O(d³) a subset; or `"auto"`: direct if
    features are at most 64 wide or the change's rank is above a third of the width, else logdet.
    """

    memory_budget = 2**28  # bytes of work space for a batch of subsets; larger batches are cut into chunks
    reference_set: FittedSet

    def __init__(self, real: FeatureStatistics, method: str = "auto"):
        if method not in ("auto", "logdet", "direct"):
            raise ValueError(f"method={method!r} is unknown: choose 'auto', 'logdet' or 'direct'.")
        self.method, self.dimension = method, real.dimension
        self.image_size = real.metadata.get("image_size")  # of the real images, if it is known
        self._real = RealRoot.of(real)

    def fit(self, features: Tensor) -> "FrechetDistance":
        """Takes features `(N, d)` of any float dtype, N ≥ 2, as the reference set; moments are computed anew."""
        check_features(features, "reference features", self.dimension, least=2)
        self._real = self._real.to(features.device)
        self.reference_set = FittedSet(features.double(), self._real)
        self._logdet: LogDeterminants | None = None
        self._value: float | None = None
        return self

    @property
    def value(self) -> float:
        own = self.reference_set
        if self._value is None:
            if self._logdet is None:
                roots = own.root_trace(own.product, own.rank_of(own.count))
            else:
                roots = self._logdet.root_trace
            self._value = own.distance(own.mean - own.real.mean, own.trace, roots).item()
        return self._value

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """Distances `(B,)` after replacing rows, see [`~metrics.Distance.replaced`]."""
        return self._changed(indices, features, leave_one_in=False)

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """Credit `(B, n)` of each new row, see [`~metrics.Distance.leave_one_in`]; N ≥ 3."""
        return self._changed(indices, features, leave_one_in=True)

    @torch.no_grad()
    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Gradient `(B, n, d)` of `replaced` with respect to the new rows, see [`~metrics.Distance.gradient`].

        With `G = I - R A'^-½ R`, `A' = R S' R`, row x of the updated set has the gradient

            2/(N - 1) · G (x - m') + 2/N · (m' - m_r)

        from `d Tr A^½ = ½ Tr(A^-½ dA)`; the mean's part of `dS'` cancels, as rows about their mean sum to 0. It costs
        one eigendecomposition per subset, whatever `method` is. `A'^-½` is the pseudo-inverse's: eigenvalues that are
        0 by the rank of the sets, or up to rounding, contribute nothing. This is exact, because `Tr A'^½` is the
        nuclear norm of the rows times R, smooth at the greatest possible rank. If the set has collapsed (copies of a
        row in a set of N ≤ d, a feature that no longer varies), the result is the mean of the one-sided derivatives.
        """
        indices, features = check_replacement(indices, features, self.reference_set.rows)
        return self._in_chunks(self.reference_set.gradient, indices, features)

    def delete_one(self, indices: Tensor) -> Tensor:
        """
        Change of the distance `(M,)` without row i of `indices`, see [`~metrics.Distance.delete_one`]; N ≥ 3.

        With `z = x - m`: `m' = m - z / (N - 1)`, `S' = (N - 1)/(N - 2) · [S - N/(N - 1)² · zzᵀ]`.
        """
        logdet = self._log_determinants()
        return torch.cat([logdet.delete_one(chunk) for chunk in indices.to(logdet.rows.device).split(4096)])

    def _log_determinants(self) -> LogDeterminants:
        self._logdet = self._logdet or LogDeterminants(self.reference_set)
        return self._logdet

    def _changed(self, indices: Tensor, features: Tensor, leave_one_in: bool) -> Tensor:
        own = self.reference_set
        indices, features = check_replacement(indices, features, own.rows)
        narrow = self.dimension <= 64 or 3 * (2 * indices.shape[1] + 1) > self.dimension
        if self.method == "direct" or (self.method == "auto" and narrow and not leave_one_in):
            return self._in_chunks(own.replaced, indices, features, leave_one_in)
        results, failed = self._log_determinants().changed(indices, features, leave_one_in, self.memory_budget)
        if failed.any():
            results[failed] = self._in_chunks(own.replaced, indices[failed], features[failed], leave_one_in)
        return results

    def _in_chunks(self, function: Callable[..., Tensor], indices: Tensor, features: Tensor, *args: bool) -> Tensor:
        """Results of a function of subsets, on as many at a time as the memory budget allows."""
        chunk = max(1, self.memory_budget // (8 * self.dimension * (6 * self.dimension + 7 * indices.shape[1])))
        pieces = zip(indices.split(chunk), features.split(chunk), strict=True)
        return torch.cat([function(idx, new, *args) for idx, new in pieces])
