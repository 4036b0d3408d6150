# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The interface of a distance, and distances by name."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .extractors import FeatureExtractor, describe_extractor
from .frechet import FrechetDistance
from .kernel import KernelDistance
from .statistics import FeatureStatistics, check_extractor, load_features

RealData = FeatureStatistics | Tensor | str | os.PathLike


class Distance(Protocol):
    """
    Distance of a generated set, the reference set, from real data, and its exact change when the set changes.

    Rewards need `fit`, `value` and `replaced`; credit by image `leave_one_in`, the control variate `delete_one`,
    back-propagated rewards `gradient`. Results are float64 without a graph, on the reference set's device. A shallow
    copy (`copy.copy`) must share the real data and allow a `fit` of its own.
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
        """
        Credit `(B, n)` of each new row: the updated set's distance minus its distance without that row. It is negative
        for a row that brings the set nearer to the real data. A row earns nothing for what the others of its subset
        already supply, which makes this the credit to train on.
        """

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """Gradient `(B, n, d)` of `replaced` with respect to the new rows, one subset at a time."""

    def delete_one(self, indices: Tensor) -> Tensor:
        """Distances without row i of `indices` `(M,)` minus `value`, `(M,)`."""


DISTANCES: dict[str, Callable[..., Distance]] = {"frechet": FrechetDistance, "kernel": KernelDistance}


def build_distance(
    distance: str | Callable[..., Distance], real: RealData, extractor: FeatureExtractor | None = None
) -> Distance:
    """
    Builds a distance to real data.

    Args:
        distance (`str` or `Callable`): `"frechet"`, `"kernel"`, or a function from the real data to a distance.
        real ([`FeatureStatistics`], `torch.Tensor` of shape `(M, d)` or path): the real data. A function gets the
            features of a file that holds them, else its statistics.
        extractor (`Callable`, *optional*): if it has a `name`, it must be the extractor that the real data names, with
            the same resize and weights.
    """
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r} is unknown: choose one of {sorted(DISTANCES)}, or a function.")
        distance = DISTANCES[distance]
    built: Any = distance.func if isinstance(distance, partial) else distance
    name = getattr(extractor, "name", None)
    path = real if isinstance(real, str | os.PathLike) else None
    if path is not None:
        real = FeatureStatistics.load(path, name)
    metadata = real.metadata if isinstance(real, FeatureStatistics) else {}
    if metadata and name is not None:
        check_extractor(metadata, describe_extractor(extractor))
    if path is not None and built is not FrechetDistance:
        features = load_features(path)
        if features is None and built is KernelDistance:
            raise ValueError(f"{path} holds no features (M, d), which this distance needs: save them there too.")
        real = real if features is None else features
    if built is FrechetDistance and isinstance(real, Tensor):
        real = FeatureStatistics.from_features(real)
    return distance(real)
