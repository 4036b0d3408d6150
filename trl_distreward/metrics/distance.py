# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The interface of a distance, and distances by name."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .checks import load_real_features, read_header
from .extractors import FeatureExtractor, extractor_digest
from .frechet import FrechetDistance
from .kernel import KernelDistance
from .statistics import FeatureStatistics, check_extractor

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


def supports(distance: Distance, method: str) -> bool:
    """Whether a distance has a method."""
    return hasattr(distance, method)


DISTANCES: dict[str, Callable[..., Distance]] = {"frechet": FrechetDistance, "kernel": KernelDistance}


def build_distance(
    distance: str | Callable[..., Distance], real: RealData, extractor: FeatureExtractor | None = None
) -> Distance:
    """
    Builds a distance to real data.

    Args:
        distance (`str` or `Callable`): `"frechet"`, `"kernel"`, or a function from the real data to a distance.
        real ([`FeatureStatistics`], `torch.Tensor` of shape `(M, d)` or path): the real data. A path is read first: a
            function gets the features if the file holds them, else statistics.
        extractor (`Callable`, *optional*): if it has a `name`, it must be the extractor that the real data names, with
            the same resize and weights.
    """
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r} is unknown: choose one of {sorted(DISTANCES)}, or a function.")
        distance = DISTANCES[distance]
    built: Any = distance.func if isinstance(distance, partial) else distance
    name = getattr(extractor, "name", None)
    metadata: dict[str, str] = {}
    if isinstance(real, str | os.PathLike):
        held, metadata = read_header(real)
        if built is KernelDistance or ("features" in held and not (built is FrechetDistance and "mean" in held)):
            real = load_real_features(real)
        else:
            real = FeatureStatistics.load(real, name)
    if built is FrechetDistance and isinstance(real, Tensor):
        real = FeatureStatistics.from_features(real)
    if isinstance(real, FeatureStatistics):
        metadata = metadata or real.metadata
    if metadata and name is not None:
        weights = extractor_digest(extractor) if "weights" in metadata else None
        check_extractor(metadata, 0, extractor=name, resize=getattr(extractor, "resize", None), weights=weights)
    return distance(real)
