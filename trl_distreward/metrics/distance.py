# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a distance is to rewards and metrics, and distances by name."""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checks import load_real_features
from .extractors import extractor_digest
from .frechet import FrechetDistance
from .kernel import KernelDistance
from .sliced import SlicedWassersteinDistance
from .statistics import FeatureStatistics, check_extractor


class Distance(Protocol):
    """
    Distance of a generated set, the reference set, from real data, and its exact change when the set changes.

    Rewards need `fit`, `value` and `replaced`; credit by image needs `leave_one_in`, the control variate `delete_one`,
    rewards that are back-propagated `gradient`. Results are float64.
    """

    @property
    def value(self) -> float:
        """Of the fitted reference set."""
        ...

    def fit(self, features: Tensor) -> "Distance":
        """Takes features `(N, d)` as the reference set."""
        ...

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """`(B,)`: after replacing rows `indices` `(B, n)` by `features` `(B, n, d)`, each subset apart."""
        ...

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """`(B, n)`: of each set so updated, minus the distance it has without the new row j."""
        ...

    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """`(B, n, d)`: of `replaced` with respect to the new features, each subset apart; needed by back-propagated
        rewards. Without a graph."""
        ...

    def delete_one(self, indices: Tensor) -> Tensor:
        """`(M,)`: without row i of `indices` `(M,)`, minus `value`."""
        ...


def supports(distance: Any, method: str) -> bool:
    """Whether a distance has a method, and so have all that it is made of."""
    asked = getattr(distance, "supports", None)
    return hasattr(distance, method) and (asked is None or asked(method))


DISTANCES: dict[str, Callable[[Any], Any]] = {
    "frechet": FrechetDistance,
    "kernel": KernelDistance,
    "sliced_wasserstein": SlicedWassersteinDistance,
}
_COMPARE_FEATURES = (KernelDistance, SlicedWassersteinDistance)


def build_distance(distance: str | Callable[[Any], Any], real: Any, extractor: Any = None) -> Any:
    """
    A distance by name, class or function, to real data.

    `real` is [`FeatureStatistics`] or the path of a statistics file; for distances that compare with the real features
    themselves, those features or the path of a `.safetensors` file that holds them as `"features"`. A function gets
    the features where the file holds them, and statistics otherwise. An `extractor` with a `name` must be the one
    that the statistics name, if they do, with the same weights.
    """
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r} is unknown: choose one of {sorted(DISTANCES)} or pass a class.")
        distance = DISTANCES[distance]
    built = distance.func if isinstance(distance, partial) else distance
    name, resize = (getattr(extractor, attribute, None) for attribute in ("name", "resize"))
    metadata = _metadata(real) if isinstance(real, str | os.PathLike) else {}
    if isinstance(real, str | os.PathLike) and built not in _COMPARE_FEATURES:
        held = _tensor_names(real)
        if "features" not in held or (built is FrechetDistance and "mean" in held):
            real = FeatureStatistics.load(real, name)
        else:
            real = load_real_features(real, "this distance")
    if built is FrechetDistance and isinstance(real, Tensor):
        real = FeatureStatistics.from_features(real)
    if isinstance(real, FeatureStatistics):
        metadata = real.metadata
    if metadata and name is not None:
        weights = extractor_digest(extractor) if "weights" in metadata else None
        dimension = getattr(real, "dimension", 0)  # compared when features are there
        check_extractor(metadata, dimension, extractor=name, resize=resize, weights=weights)
    return distance(real)


def _metadata(path: str | os.PathLike) -> dict[str, str]:
    """What a `.safetensors` file of real data says of it; of others, reading them tells."""
    if not str(path).endswith(".safetensors") or not os.path.isfile(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("metadata", "{}"))
    except SafetensorError:
        return {}  # damaged: reading the data says so


def _tensor_names(path: str | os.PathLike) -> set[str]:
    if not str(path).endswith(".safetensors") or not os.path.isfile(path):
        return set()
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError:
        return set()  # damaged: reading the statistics says so
