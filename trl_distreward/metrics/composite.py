# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Distances made of distances: a weighted sum, and an extrapolation to an infinite generated set."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_fitted, check_replacement, check_rows, check_shape_and_values
from .distance import supports


class SumDistance:
    """
    Weighted sum of distances in one feature space: all of them see the same features.

    Where a member has no `add_one`, as [`DebiasedDistance`], calling it raises `AttributeError`.

    Args:
        distances (`dict` or `list` of distances): not fitted yet, of one dimension; a list's names are "0", "1", ….
        weights (`dict[str, float]` or `list[float]`, *optional*): not negative, 1 by default.
        normalize (`bool`, *optional*, defaults to `False`):
            divides each member by its value at the first `fit`, so that no member dominates by its units and the sum
            of the first reference set is the sum of the weights.

    Attributes:
        value (`float`): the sum for the fitted reference set.
        features (`torch.Tensor` or `None`): the fitted rows.
        scales (`dict[str, float]`): what members are divided by, empty before the first `fit` of a normalized sum. Set
            it to the saved one when a run is resumed: later fits keep it.

    Raises:
        ValueError: no distances, names of weights that differ from those of distances, weights that are negative or
            all 0, several dimensions.

    Example:

    ```python
    >>> distance = SumDistance({"fd": FrechetDistance(statistics), "mmd": KernelDistance(real)}, normalize=True)
    >>> distance.fit(generated).value  # (N, d)
    2.0
    ```
    """

    value: float

    def __init__(
        self,
        distances: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        normalize: bool = False,
    ):
        self.distances: dict[str, Any] = _named(distances)
        if not self.distances:
            raise ValueError("distances is empty: a sum needs at least one.")
        self.weights: dict[str, float] = dict.fromkeys(self.distances, 1.0) if weights is None else _named(weights)
        if set(self.weights) != set(self.distances):
            raise ValueError(
                f"weights are given for {sorted(self.weights)}, distances are {sorted(self.distances)}: give one each."
            )
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"weights={self.weights} must be numbers of at least 0, and not all 0.")
        dimensions = {name: distance.dimension for name, distance in self.distances.items()}
        if len(set(dimensions.values())) > 1:
            raise ValueError(
                f"the distances have dimensions {dimensions}: a sum is over one feature space; give the reward "
                "several feature spaces instead."
            )
        self.normalize = normalize
        self._scales: dict[str, float] = {}
        self.features: Tensor | None = None

    @property
    def dimension(self) -> int:
        return next(iter(self.distances.values())).dimension

    @property
    def scales(self) -> dict[str, float]:
        return dict(self._scales)

    @scales.setter
    def scales(self, scales: Mapping[str, float]) -> None:
        if scales and set(scales) != set(self.distances):
            raise ValueError(f"scales are of {sorted(scales)}, distances are {sorted(self.distances)}: give one each.")
        self._scales = _checked_scales(scales)
        if self.features is not None:
            self.value = self._sum_values()

    def __copy__(self) -> "SumDistance":
        """A sum that can be fitted apart: its members are copies, which share the real side."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.distances = {name: copy.copy(distance) for name, distance in self.distances.items()}
        return other

    def supports(self, method: str) -> bool:
        """Whether every member has `method`."""
        return all(supports(distance, method) for distance in self.distances.values())

    def without_scales(self) -> "SumDistance":
        """A copy that is not normalized: its values compare from set to set and from run to run."""
        other = copy.copy(self)
        other.normalize, other._scales = False, {}
        return other

    def fit(self, features: Tensor) -> "SumDistance":
        """
        Fits every member to the reference set `features` `(N, d)`.

        Raises:
            ValueError: as the members' `fit`; in a normalized sum a member's first value is not positive.
        """
        for distance in self.distances.values():
            distance.fit(features)
        if self.normalize and not self._scales:
            self._scales = _checked_scales({name: distance.value for name, distance in self.distances.items()})
        self.features = features.detach()
        self.value = self._sum_values()
        return self

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """Distances `(B,)` after replacing rows `indices` `(B, n)` by `features` `(B, n, d)`, each subset apart."""
        return self._sum("replaced", indices, features)

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """Credits `(B, n)` of new rows: the updated set's distance minus its distance without the row."""
        return self._sum("leave_one_in", indices, features)

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """Gradient `(B, n, d)` of `replaced` with respect to the new rows: the members', weighted as they are."""
        return self._sum("gradient", indices, features)

    def delete_one(self, indices: Tensor) -> Tensor:
        """Distances without each row of `indices` `(M,)` minus the distance as it is, `(M,)`."""
        return self._sum("delete_one", indices)

    def add_one(self, features: Tensor) -> Tensor:
        """Distances with each row of `features` `(M, d)` added minus the distance as it is, `(M,)`; a diagnostic."""
        return self._sum("add_one", features)

    def _factor(self, name: str) -> float:
        return self.weights[name] / self._scales.get(name, 1.0)

    def _sum_values(self) -> float:
        return sum(self._factor(name) * distance.value for name, distance in self.distances.items())

    def _sum(self, method: str, *arguments: Tensor) -> Tensor:
        check_fitted(self.features, method)
        parts = [self._factor(name) * getattr(d, method)(*arguments) for name, d in self.distances.items()]
        return torch.stack(parts).sum(dim=0)


def _named(items: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    return dict(items) if isinstance(items, Mapping) else {str(i): item for i, item in enumerate(items)}


def _checked_scales(scales: Mapping[str, float]) -> dict[str, float]:
    bad = {name: scale for name, scale in scales.items() if not 0 < scale < float("inf")}
    if bad:
        raise ValueError(
            f"the scales {bad} are not positive, so dividing by them would turn the distance round: leave normalize "
            "off and set weights (an unbiased MMD² can be negative near 0; unbiased=False is not)."
        )
    return dict(scales)


class DebiasedDistance:
    """
    A distance extrapolated to an infinite generated set, from a reference set `G` of N rows and two halves of it:

        D(G) debiased = 2 D(G) - ½ (D(half₁) + D(half₂))

    A distance of a finite set is biased by about c/N: E[D_N] ≈ D_∞ + c/N, and half as many rows have twice the bias
    (Chong and Forsyth, arXiv 1911.07023, extrapolate the same line from many sizes). Minimising the plain distance
    rewards a generator for shrinking its spread, which lowers c; the debiased one does not, up to 1/N². It varies
    more from set to set and can be negative. An unbiased MMD² has no such bias and gains nothing.

    The halves are rows of one random permutation, fixed by `seed` and N, of ⌊N/2⌋ rows each; of an odd N one row is
    in neither. A row's credit is the difference of the debiased distance with and without the row *in the whole set
    and in its half*, the other half as it is:

        leave_one_in = 2 · leave_one_in of the whole - ½ · leave_one_in of its half (nothing for a row in neither)
        delete_one   = 2 · delete_one of the whole   - ½ · delete_one of its half

    Each is exact, as the three members' are, and costs what the three of them cost. There is no `add_one`: a row
    that is added belongs to no half.

    Args:
        distance_factory (`Callable[[], distance]`):
            makes a distance; called three times. To share the real side give copies of one distance:
            `lambda: copy.copy(distance)`.
        seed (`int`, *optional*, defaults to 0): of the permutation.

    Attributes:
        value (`float`): the extrapolated distance of the fitted reference set.
        features (`torch.Tensor` or `None`): the fitted rows.
        whole, halves: the members.

    Raises:
        ValueError: the factory gives the same object twice, or normalized sums: their parts would each have scales
            of their own; normalize a sum of debiased distances instead.

    Example:

    ```python
    >>> distance = DebiasedDistance(lambda: FrechetDistance(statistics)).fit(generated)  # (N, d)
    ```
    """

    value: float

    def __init__(self, distance_factory: Callable[[], Any], seed: int = 0):
        self.whole, *self.halves = (distance_factory() for _ in range(3))
        if len({id(member) for member in (self.whole, *self.halves)}) < 3:
            raise ValueError("distance_factory gave one object several times: it must make a new one at each call.")
        if getattr(self.whole, "normalize", False):
            raise ValueError(
                "distance_factory gives normalized sums, whose parts would be divided by scales of their own: use "
                "SumDistance({…: DebiasedDistance(…)}, normalize=True)."
            )
        self.seed = seed
        self.features: Tensor | None = None

    @property
    def dimension(self) -> int:
        return self.whole.dimension

    def __copy__(self) -> "DebiasedDistance":
        """A distance that can be fitted apart: its members are copies, which share the real side."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.whole, other.halves = copy.copy(self.whole), [copy.copy(half) for half in self.halves]
        return other

    def supports(self, method: str) -> bool:
        """Whether its members have `method`."""
        return supports(self.whole, method)

    def fit(self, features: Tensor) -> "DebiasedDistance":
        """
        Sets the reference set.

        Args:
            features (`torch.Tensor` of shape `(N, d)`): any float dtype, N ≥ 8.

        Raises:
            ValueError: wrong shape or dimension, fewer than 8 rows, NaN or infinite values.
        """
        check_shape_and_values(features, "reference features", self.dimension)
        count, size = len(features), len(features) // 2
        if size < 4:
            raise ValueError(f"the reference set has {count} rows: each half of it needs at least 4, so give 8.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).to(features.device)
        self._half = torch.full_like(order, -1)  # (N,), which half a row is in; -1 for a row in neither
        self._place = torch.zeros_like(order)  # (N,), its number there
        self._members = order[: 2 * size].view(2, size)  # rows of each half
        for half, rows in enumerate(self._members):
            self._half[rows] = half
            self._place[rows] = torch.arange(size, device=rows.device)
            self.halves[half].fit(features[rows])
        self.whole.fit(features)
        self.features = features.detach()
        self.value = 2 * self.whole.value - 0.5 * (self.halves[0].value + self.halves[1].value)
        return self

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Debiased distances after replacing rows `indices[b]` by `features[b]`, in the set and in the rows' halves.

        Args:
            indices (`torch.LongTensor` of shape `(B, n)`): distinct rows within each subset, from 0 to N - 1.
            features (`torch.Tensor` of shape `(B, n, d)`): the new rows.

        Returns:
            `torch.Tensor` of shape `(B,)`, float64.

        Raises:
            ValueError: as the members' `replaced`, and if a subset replaces all rows of a half.
        """
        indices, features = self._checked("replaced", indices, features)
        total = 2 * self.whole.replaced(indices, features)
        for half, member in enumerate(self.halves):
            padded = self._in_half(half, indices, features)
            total = total - 0.5 * (member.value if padded is None else member.replaced(*padded[:2]))
        return total

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Credit of each new row: the debiased distance of the updated set minus the one without that row.

        Args:
            indices, features: as in [`~DebiasedDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n)`, float64.
        """
        indices, features = self._checked("leave_one_in", indices, features)
        total = 2 * self.whole.leave_one_in(indices, features)
        for half, member in enumerate(self.halves):
            padded = self._in_half(half, indices, features)
            if padded is not None:
                here = self._half[indices] == half  # (B, n)
                credits = member.leave_one_in(*padded[:2]).gather(1, padded[2])
                total = total - 0.5 * credits * here
        return total

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Gradient of [`~DebiasedDistance.replaced`] with respect to the new rows, each subset apart.

        It is 2 · gradient of the whole - ½ · gradient of the row's half (nothing for a row in neither).

        Args:
            indices, features: as in [`~DebiasedDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n, d)`, float64, without a graph.

        Raises:
            ValueError: as [`~DebiasedDistance.replaced`].
        """
        indices, features = self._checked("gradient", indices, features)
        total = 2 * self.whole.gradient(indices, features)
        for half, member in enumerate(self.halves):
            padded = self._in_half(half, indices, features)
            if padded is not None:
                here = self._half[indices] == half  # (B, n)
                columns = padded[2][:, :, None].expand_as(features)
                total = total - 0.5 * member.gradient(*padded[:2]).gather(1, columns) * here[:, :, None]
        return total

    def delete_one(self, indices: Tensor) -> Tensor:
        """
        Debiased distance without row `indices[i]` minus the distance with it, for each i apart.

        Args:
            indices (`torch.LongTensor` of shape `(M,)`): rows of the reference set.

        Returns:
            `torch.Tensor` of shape `(M,)`, float64.
        """
        fitted = check_fitted(self.features, "delete_one")
        rows = check_rows(indices, len(fitted)).to(fitted.device)
        total = 2 * self.whole.delete_one(rows)
        for half, member in enumerate(self.halves):
            here = self._half[rows] == half
            if here.any():
                total[here] -= 0.5 * member.delete_one(self._place[rows[here]])
        return total

    def _checked(self, method: str, indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        fitted = check_fitted(self.features, method)
        features = check_replacement(indices, features, len(fitted), self.dimension)
        return indices.to(fitted.device), features.to(fitted.device)

    def _in_half(self, half: int, indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """
        A replacement `(B, n)` as one half sees it: places `(B, k)`, rows `(B, k, d)` and columns `(B, n)` of the new
        rows among the k; None if it sees nothing of it.

        Subsets have different numbers of rows in the half. All are filled up to the largest number k with rows that
        are replaced by themselves.
        """
        here = self._half[indices] == half  # (B, n)
        width, size = int(here.sum(dim=1).max()), self._members.shape[1]
        if width == 0:
            return None
        if width >= size:
            raise ValueError(
                f"a subset replaces all {size} rows of a half: replace fewer rows than N/2 = {size}, or judge them "
                "against a larger reference set."
            )
        untouched = torch.ones(len(indices), size, dtype=torch.bool, device=indices.device)
        subset, column = here.nonzero(as_tuple=True)
        untouched[subset, self._place[indices[subset, column]]] = False
        fillers = untouched.sort(dim=1, descending=True, stable=True).indices  # (B, N/2), untouched places first
        own = here.sum(dim=1, keepdim=True)  # (B, 1)
        number = torch.arange(width, device=indices.device)
        places = fillers.gather(1, (number - own).clamp(min=0))  # (B, k)
        places[number < own] = self._place[indices[here]]
        rows = self.features[self._members[half][places]].double()  # type: ignore[index]  # (B, k, d)
        rows[number < own] = features[here]
        return places, rows, (here.cumsum(dim=1) - 1).clamp(min=0)
