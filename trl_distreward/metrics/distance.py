# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The interface of a distance, and distances by name."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .frechet import FrechetDistance
from .kernel import KernelDistance


class Distance(Protocol):
    """
    Distance of a generated set, the reference set, from real data, and its exact change when the set changes.

    Rewards need `fit`, `value` and `replaced`; other options more. Results are float64 without a graph, on the
    reference set's device. A shallow copy (`copy.copy`) must share the real data and allow a `fit` of its own.
    """

    @property
    def value(self) -> float:
        """Distance of the fitted reference set."""

    def fit(self, features: Tensor) -> "Distance":
        """Takes features `(N, d)` as the reference set."""

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Distances `(B,)` of the reference set after replacing its rows `indices[b]` by `features[b]`, one subset b at a
        time. Rows `(B, n)` are distinct within a subset and from 0 to N - 1, the new features are `(B, n, d)`. A
        `ValueError` names wrong shapes, repeated or out-of-range rows, and NaN or infinite features.
        """

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """Credit `(B, n)` of each new row: the updated set's distance minus that without the row."""

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """Gradient `(B, n, d)` of `replaced` with respect to the new rows, one subset at a time."""

    def delete_one(self, indices: Tensor) -> Tensor:
        """Distances without row i of `indices` `(M,)` minus `value`, `(M,)`."""


DISTANCES: dict[str, Callable[..., Distance]] = {"frechet": FrechetDistance, "kernel": KernelDistance}
