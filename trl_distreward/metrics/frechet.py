# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance between Gaussians, and its exact value after replacing rows of a set.

With mean `m`, covariance `S` of the generated features and `m_r`, `S_r` of the real ones (Dowson and Landau, 1982):

    FD = |m - m_r|² + Tr S + Tr S_r - 2 Tr (S_r^½ S S_r^½)^½
"""

import torch
from torch import Tensor

from .statistics import FeatureStatistics, check_features


def symmetric_sqrt(matrix: Tensor, rank: int | None = None) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix, keeping at most the `rank` largest eigenvalues."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * _clean(eigenvalues, rank).sqrt()) @ eigenvectors.mT


def _clean(eigenvalues: Tensor, rank: int | None) -> Tensor:
    """Ascending eigenvalues with rounding noise removed: below zero, and beyond what the rank allows, they are 0.

    Left in, a zero eigenvalue of a rank-deficient covariance returns as about 1e-16 of the largest, whose square root
    is 1e-8 of it: with hundreds of them the trace is wrong in the sixth digit.
    """
    eigenvalues = eigenvalues.clamp(min=0)
    if rank is not None and rank < eigenvalues.shape[-1]:
        eigenvalues[..., : eigenvalues.shape[-1] - rank] = 0
    return eigenvalues


def frechet_distance(generated: FeatureStatistics, real: FeatureStatistics) -> float:
    """
    Fréchet distance between two sets of features (FID when they are Inception-v3's; Heusel et al., arXiv 1706.08500).

    Args:
        generated, real ([`FeatureStatistics`]): of the same dimension; the distance is symmetric in them.

    Returns:
        `float`: the distance, computed in float64.

    Raises:
        ValueError: the dimensions differ, or a set has fewer than 2 vectors.
    """
    if generated.dimension != real.dimension:
        raise ValueError(
            f"the statistics have dimensions {generated.dimension} and {real.dimension}: they come from different "
            "extractors and cannot be compared."
        )
    covariance, real_covariance = generated.covariance, real.covariance.to(generated.mean.device)
    root = symmetric_sqrt(real_covariance, real.rank_bound)
    rank = min(generated.rank_bound, real.rank_bound)
    spectrum = _clean(torch.linalg.eigvalsh(_symmetric(root @ covariance @ root)), rank)
    mean_term = (generated.mean - real.mean.to(generated.mean.device)).square().sum()
    distance = mean_term + covariance.trace() + real_covariance.trace() - 2 * spectrum.sqrt().sum()
    return max(distance.item(), 0.0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


class FrechetDistance:
    """
    Fréchet distance of a reference set from real data, and its exact values after some of its rows are replaced.

    Args:
        real ([`FeatureStatistics`]): of the real data.

    Attributes:
        value (`float`): the distance of the fitted reference set.

    Example:

    ```python
    >>> distance = FrechetDistance(FeatureStatistics.from_features(real)).fit(generated)  # (N, d)
    >>> distance.replaced(indices, new_features)  # (B, n), (B, n, d) -> (B,)
    ```
    """

    # Bytes of work space for a batch of subsets; larger batches are cut into chunks.
    memory_budget = 2**28

    def __init__(self, real: FeatureStatistics):
        self.real = real
        self._root = symmetric_sqrt(real.covariance, real.rank_bound)  # R = S_r^½
        self.features: Tensor | None = None

    @property
    def dimension(self) -> int:
        return self.real.dimension

    def fit(self, features: Tensor) -> "FrechetDistance":
        """
        Sets the reference set.

        Args:
            features (`torch.Tensor` of shape `(N, d)`): any float dtype; moments are computed in float64.

        Raises:
            ValueError: wrong shape or dimension, fewer than 2 rows, NaN or infinite values.
        """
        features = check_features(features, "reference features", self.dimension)
        if len(features) < 2:
            raise ValueError(f"the reference set has {len(features)} row: a covariance needs at least 2.")
        device = features.device
        self._root, self._real_mean = self._root.to(device), self.real.mean.to(device)
        self._real_trace = self.real.covariance.trace().to(device)
        self._mean = features.mean(dim=0)
        self.features = features - self._mean  # rows about the set's mean, so that products do not cancel
        covariance = self.features.T @ self.features / (len(features) - 1)
        self._trace = covariance.trace()
        self._projected = self.features @ self._root  # (N, d), rows z R
        self._product = _symmetric(self._root @ covariance @ self._root)  # A = R S R
        self._rank = min(len(features) - 1, self.real.rank_bound)
        self.value = self._distance(self._product, self._mean, self._trace).item()
        return self

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Distances of the reference set after replacing its rows `indices[b]` by `features[b]`, for each subset b apart.

        Args:
            indices (`torch.LongTensor` of shape `(B, n)`): distinct rows within each subset, from 0 to N - 1.
            features (`torch.Tensor` of shape `(B, n, d)`): the new rows.

        Returns:
            `torch.Tensor` of shape `(B,)`, float64: exact distances.

        Raises:
            ValueError: before `fit`, on wrong shapes, repeated or out-of-range rows, NaN or infinite features.
        """
        if self.features is None:
            raise ValueError("replaced() needs a reference set: call fit(features) first.")
        features = _check_replacement(indices, features, len(self.features), self.dimension).to(self.features.device)
        indices = indices.to(self.features.device)
        per_subset = 8 * self.dimension * (3 * self.dimension + 4 * indices.shape[1])
        chunk = max(1, self.memory_budget // per_subset)
        pieces = zip(indices.split(chunk), features.split(chunk), strict=True)
        return torch.cat([self._replaced(idx, new) for idx, new in pieces])

    def _replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """Moment update of rank 2n + 1 in the basis where the eigenvalues are needed: A' = R S' R."""
        count = len(self.features)  # type: ignore[arg-type]
        added, removed = features - self._mean, self.features[indices]  # type: ignore[index]  # (B, n, d)
        shift = (added.sum(dim=1) - removed.sum(dim=1)) / count  # new mean minus old, (B, d)
        added_r, removed_r, shift_r = added @ self._root, self._projected[indices], shift @ self._root
        change = added_r.mT @ added_r - removed_r.mT @ removed_r - count * shift_r[:, :, None] * shift_r[:, None, :]
        product = self._product + change / (count - 1)  # (B, d, d)
        squares = added.square().sum((1, 2)) - removed.square().sum((1, 2)) - count * shift.square().sum(1)
        return self._distance(product, self._mean + shift, self._trace + squares / (count - 1))

    def _distance(self, product: Tensor, mean: Tensor, trace: Tensor) -> Tensor:
        spectrum = _clean(torch.linalg.eigvalsh(product), self._rank)
        mean_term = (mean - self._real_mean).square().sum(-1)
        return mean_term + trace + self._real_trace - 2 * spectrum.sqrt().sum(-1)


def _check_replacement(indices: Tensor, features: Tensor, count: int, dimension: int) -> Tensor:
    """Validates one call of `replaced`; returns the features in float64."""
    if indices.ndim != 2 or features.shape[:2] != indices.shape or features.ndim != 3:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)} and features {tuple(features.shape)}: "
            "they must be (B, n) and (B, n, d)."
        )
    if indices.shape[1] >= count:
        raise ValueError(
            f"replace_size={indices.shape[1]} is not smaller than the reference set of {count}: replace fewer images."
        )
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(f"indices span {indices.min()} to {indices.max()}: they must lie in 0 to {count - 1}.")
    ordered = indices.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("a subset names the same row twice: the rows of one subset must be distinct.")
    flat = check_features(features.flatten(0, 1), "new features", dimension)
    return flat.view(features.shape)
