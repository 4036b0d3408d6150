# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sliced Wasserstein distance between sets of features, and its exact value after replacing rows of one.

Between N sorted numbers `x_(i)` and a real distribution with quantile function Q the squared 2-Wasserstein distance is
`Σ_i ∫_{bin i} (x_(i) - Q(u))² du` over N bins of width 1/N (Bonneel et al., JMIV 2015, Sec. 3, for equal sizes). With
`q_i = N ∫_{bin i} Q(u) du` it splits into what depends on the generated numbers and a constant of N alone:

    W2² = Σ_i (x_(i) - q_i)² / N + V_N,    V_N = ∫ Q(u)² du - Σ_i q_i² / N
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_features,
    check_fitted,
    check_replacement,
    check_rows,
    check_shape_and_values,
    load_real_features,
)
from .precision import mean_of_rows


@dataclass(frozen=True)
class _Bins:
    """The real distribution along each projection in K bins of equal mass."""

    means: Tensor  # (L, K)
    within: Tensor  # (L,), V_K

    def costs(self, ordered: Tensor) -> Tensor:
        """W2² of K sorted numbers per projection, (..., L, K) -> (..., L)."""
        return (ordered - self.means).square_().mean(dim=-1) + self.within

    def __getitem__(self, key: slice) -> "_Bins":
        return _Bins(self.means[key], self.within[key])


class SlicedWassersteinDistance:
    """
    Mean over fixed random directions of the squared 2-Wasserstein distance (W2²) between a reference set and real
    features projected on them, and its exact values after some rows are replaced, left out or added.

    The sets may have any sizes: quantile functions are integrated exactly (see the module's formula). Everything is
    float64. Replacing rows costs one sort of N nearly ordered numbers per projection; rows left out or added cost two
    prefix sums over the sorted set, however many they are. The real set is kept as its sorted projections: 8 L M
    bytes.

    Args:
        real_features (`torch.Tensor` of shape `(M, d)` or path):
            of the real data, any float dtype, or a `.safetensors` file that holds them as `"features"`.
        num_projections (`int`, *optional*, defaults to 512): number L of directions.
        seed (`int`, *optional*, defaults to 0): of the directions, uniform on the unit sphere.

    Attributes:
        value (`float`): distance of the fitted reference set; for isotropic differences about W2² / d.
        features (`torch.Tensor` or `None`): the fitted rows.
        projections (`torch.Tensor` of shape `(d, L)`, float64): unit columns.

    Raises:
        TypeError: `real_features` are moments or nothing that can be read as features.
        ValueError: the features are no finite `(M, d)` with M ≥ 1, or `num_projections` is below 1.

    A shallow copy (`copy.copy`) shares the real side and can be fitted apart.

    Example:

    ```python
    >>> distance = SlicedWassersteinDistance(real).fit(generated)  # (M, d), (N, d)
    >>> distance.replaced(indices, new_features)  # (B, n), (B, n, d) -> (B,)
    ```
    """

    # Bytes of work space for a batch of subsets and a part of the projections; more only leaves the processor's cache.
    memory_budget = 2**25

    value: float

    def __init__(self, real_features: Tensor | str | os.PathLike, num_projections: int = 512, seed: int = 0):
        if num_projections < 1:
            raise ValueError(f"num_projections={num_projections} must be at least 1: hundreds are usual.")
        real = load_real_features(real_features, "SlicedWassersteinDistance")
        if len(real) < 1:
            raise ValueError("real_features have no rows: give at least 1.")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(real.shape[1], num_projections, generator=generator, dtype=torch.float64)
        self.projections = F.normalize(directions, dim=0).to(real.device)  # (d, L)
        self._centre = mean_of_rows(real)  # moved to the origin, so that squares do not cancel
        self._real = _sort(self._project(real))  # (L, M)
        self.features: Tensor | None = None

    @property
    def dimension(self) -> int:
        return len(self._centre)

    # ---- the distance ----

    def fit(self, features: Tensor) -> "SlicedWassersteinDistance":
        """
        Sets the reference set.

        Args:
            features (`torch.Tensor` of shape `(N, d)`): any float dtype, N ≥ 2.

        Raises:
            ValueError: wrong shape or dimension, fewer than 2 rows, NaN or infinite values.
        """
        check_shape_and_values(features, "reference features", self.dimension)
        if len(features) < 2:
            raise ValueError(f"the reference set has {len(features)} row: leaving one out needs at least 2.")
        self.features = features.detach()
        self.projections, self._centre, self._real = (
            part.to(features.device) for part in (self.projections, self._centre, self._real)
        )
        count = len(features)
        self._sorted, order = self._project(self.features).sort(dim=1)  # (L, N)
        self._ranks = torch.empty_like(order, dtype=torch.int32)  # (L, N), place of each row along each projection
        self._ranks.scatter_(1, order, torch.arange(count, dtype=torch.int32, device=order.device).expand_as(order))
        self._bins, self._fewer, self._more = (self._bin(size) for size in (count, count - 1, count + 1))
        self._costs = self._bins.costs(self._sorted)  # (L,)
        self.value = self._costs.mean().item()
        return self

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Distances of the reference set after replacing its rows `indices[b]` by `features[b]`, for each subset b apart.

        Args:
            indices (`torch.LongTensor` of shape `(B, n)`): distinct rows within each subset, from 0 to N - 1.
            features (`torch.Tensor` of shape `(B, n, d)`): the new rows.

        Returns:
            `torch.Tensor` of shape `(B,)`, float64.

        Raises:
            ValueError: before `fit`, on wrong shapes, repeated or out-of-range rows, NaN or infinite features.
        """
        return self._over_chunks("replaced", indices, features)

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Credit of each new row: the distance of the updated set minus its distance without that row, N - 1 rows.

        Args:
            indices, features: as in [`~SlicedWassersteinDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n)`, float64; negative where the row brings the set nearer to the real one.
        """
        return self._over_chunks("leave_one_in", indices, features)

    @torch.no_grad()
    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Gradient of [`~SlicedWassersteinDistance.replaced`] with respect to the new rows, each subset apart; for
        rewards that are back-propagated.

        A row x that is the p-th of the updated set along direction θ is pulled to the mean of the p-th bin there:

            2/(N L) · Σ_θ (θ·x - q_p) θ

        Equal numbers have kinks: the order of any permutation that sorts them gives a subgradient, along which a small
        step down lowers the distance. Here new rows come before equal rows of the reference set and among themselves
        in the order given, so that copies of one row are pulled apart.

        Args:
            indices, features: as in [`~SlicedWassersteinDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n, d)`, float64, without a graph.

        Raises:
            ValueError: as [`~SlicedWassersteinDistance.replaced`].
        """
        check_fitted(self.features, "gradient")
        features = check_replacement(indices, features, self._count, self.dimension).to(self._centre.device)
        indices = indices.to(self._centre.device)
        gradient = torch.zeros_like(features)
        for part, subsets in self._pieces(indices):
            ordered, new, _ = self._updated(part, indices[subsets], features[subsets])
            means = self._bins[part].means.expand(len(new), -1, -1)  # (b, l, N)
            pulls = new - means.gather(2, _distinct_places(ordered, new))  # (b, l, n)
            gradient[subsets] += pulls.mT @ self.projections[:, part].T
        return gradient.mul_(2 / (self._count * len(self._costs)))

    def delete_one(self, indices: Tensor) -> Tensor:
        """
        Distance without row `indices[i]` minus the distance with it, for each i apart.

        Args:
            indices (`torch.LongTensor` of shape `(M,)`): rows of the reference set.

        Returns:
            `torch.Tensor` of shape `(M,)`, float64.
        """
        check_fitted(self.features, "delete_one")
        rows = check_rows(indices, self._count).to(self._centre.device)
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for part in self._parts(self._count + len(rows)):
            without = _without_each(self._sorted[part], self._fewer[part])
            total += without.gather(1, self._ranks[part][:, rows].long()).sum(dim=0)
        return (total - self._costs.sum()) / len(self._costs)

    def add_one(self, features: Tensor) -> Tensor:
        """
        Distance with the row `features[i]` added minus the distance as it is, for each i apart.

        Not for training: many copies of one good image are each judged as if they were alone.

        Args:
            features (`torch.Tensor` of shape `(M, d)`).

        Returns:
            `torch.Tensor` of shape `(M,)`, float64.
        """
        check_fitted(self.features, "add_one")
        new = self._project(check_features(features, "new features", self.dimension).to(self._centre.device))  # (L, M)
        total = torch.zeros(new.shape[1], dtype=torch.float64, device=new.device)
        for part in self._parts(self._count + new.shape[1]):
            total += _with_each(self._sorted[part], new[part], self._more[part]).sum(dim=0)
        return (total - self._costs.sum()) / len(self._costs)

    def _over_chunks(self, method: str, indices: Tensor, features: Tensor) -> Tensor:
        check_fitted(self.features, method)
        features = check_replacement(indices, features, self._count, self.dimension).to(self._centre.device)
        indices = indices.to(self._centre.device)
        shape = indices.shape if method == "leave_one_in" else indices.shape[:1]
        total = torch.zeros(shape, dtype=torch.float64, device=features.device)
        for part, subsets in self._pieces(indices):
            ordered, _, places = self._updated(part, indices[subsets], features[subsets])
            costs = self._bins[part].costs(ordered)  # (b, l)
            if method == "leave_one_in":
                without = _without_each(ordered, self._fewer[part]).gather(2, places)  # (b, l, n)
                total[subsets] += (costs[:, :, None] - without).sum(dim=1)
            else:
                total[subsets] += costs.sum(dim=1)
        return total / len(self._costs)

    def _pieces(self, indices: Tensor) -> Iterator[tuple[slice, slice]]:
        """Parts of the projections and of the subsets `indices` (B, n) whose work space fits into the budget."""
        for part in self._parts(self._count):
            work = 8 * len(self._costs[part]) * (4 * self._count + 10 * indices.shape[1])  # bytes of one subset
            chunk = max(1, self.memory_budget // work)
            for start in range(0, len(indices), chunk):
                yield part, slice(start, start + chunk)

    def _updated(self, part: slice, indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted projections of the updated sets, (b, l, N), new rows' projections and places in them, (b, l, n)."""
        new = self._project(features.flatten(0, 1), part).view(-1, *indices.shape).transpose(0, 1).contiguous()
        old = self._ranks[part][:, indices].long().transpose(0, 1)
        ordered = self._sorted[part].repeat(len(indices), 1, 1).scatter_(2, old, new)
        ordered = _sort(ordered)
        # of several equal numbers it does not matter which one is left out
        return ordered, new, torch.searchsorted(ordered, new)

    # ---- projections and bins ----

    def _project(self, features: Tensor, part: slice = slice(None)) -> Tensor:
        """(P, d) -> (L, P), in blocks: the set may be large and its float64 copy not fit."""
        size = max(1, self.memory_budget // (32 * self.dimension))
        directions = self.projections[:, part]
        blocks = [directions.T @ (block.detach().double() - self._centre).T for block in features.split(size)]
        return torch.cat(blocks, dim=1)

    def _bin(self, count: int) -> _Bins:
        """Bins of mass 1/count: differences of the quantile function's integral, linear between the real numbers."""
        number = self._real.shape[1]
        edges = torch.arange(count + 1, device=self._real.device) * number  # in units of 1 / (number * count)
        whole = edges // count
        inside = (edges % count).double() / count  # how far an edge lies into the real number it cuts
        means, within = [], []
        for part in self._parts(number + 3 * count):
            real = self._real[part]
            integral = F.pad(real.cumsum(dim=1), (1, 0))  # (l, M + 1)
            at_edges = integral[:, whole] + inside * F.pad(real, (0, 1))[:, whole]  # (l, count + 1), times M
            mean = at_edges.diff(dim=1) * (count / number)
            means.append(mean)
            within.append(real.square().mean(dim=1) - mean.square().mean(dim=1))
        return _Bins(torch.cat(means), torch.cat(within).clamp(min=0))

    def _parts(self, width: int) -> list[slice]:
        """Parts of the projections for which a few (l, width) tables fit into the memory budget."""
        size = max(1, self.memory_budget // (64 * width))
        return [slice(start, start + size) for start in range(0, self.projections.shape[1], size)]

    @property
    def _count(self) -> int:
        return self._sorted.shape[1]


def _sort(values: Tensor) -> Tensor:
    """Sorts along the last dimension. numpy's sort is vectorised: here 14 ms where torch's on CPU takes 190 ms."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def _prefix(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, …, K values along the last dimension: (..., K) -> (..., K + 1)."""
    return F.pad(values.cumsum(dim=-1), (1, 0))


def _distinct_places(ordered: Tensor, new: Tensor) -> Tensor:
    """Places of the numbers `new` (..., n) in `ordered` (..., N), no two the same: equal ones follow one another."""
    new, order = new.sort(dim=-1, stable=True)
    number = torch.arange(new.shape[-1], device=new.device) - torch.searchsorted(new, new)  # of a number in its run
    return torch.empty_like(order).scatter_(-1, order, torch.searchsorted(ordered, new) + number)


def _without_each(ordered: Tensor, bins: _Bins) -> Tensor:
    """W2² of N sorted numbers without the p-th, for every p: those above it move one bin down. (..., L, N)."""
    below = _prefix((ordered[..., :-1] - bins.means).square())  # (..., L, N)
    above = _prefix((ordered[..., 1:] - bins.means).square())
    return (below + above[..., -1:] - above) / bins.means.shape[1] + bins.within[:, None]


def _with_each(ordered: Tensor, new: Tensor, bins: _Bins) -> Tensor:
    """W2² of N sorted numbers and one of `new` (L, M), for each of them: those above it move one bin up. (L, M)."""
    places = torch.searchsorted(ordered, new)
    below = _prefix((ordered - bins.means[:, :-1]).square())  # (L, N + 1)
    above = _prefix((ordered - bins.means[:, 1:]).square())
    own = (new - bins.means.gather(1, places)).square()
    sums = below.gather(1, places) + own + above[:, -1:] - above.gather(1, places)
    return sums / bins.means.shape[1] + bins.within[:, None]
