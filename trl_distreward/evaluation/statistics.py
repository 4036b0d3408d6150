# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of a set's collected features, written with what they were made of."""

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import __version__
from ..metrics.statistics import FeatureStatistics
from .collect import CollectedFeatures
from .files import stream_safetensors


def describe(collected: CollectedFeatures, extractor: Any, **settings: Any) -> dict[str, str]:
    """What is written beside statistics: the extractor and its resize, the images, and the versions that made them."""
    said = {
        "extractor": extractor.name,
        "resize": extractor.resize,
        "weights": collected.weights,
        "image_size": "x".join(map(str, reversed(collected.image_size))),
        "image_modes": json.dumps(collected.modes),
        "skipped": len(collected.skipped) or None,
        "library": f"trl-distreward {__version__}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pillow")),
        **settings,
    }
    return {key: str(value) for key, value in said.items() if value is not None}


def write_statistics(
    collected: CollectedFeatures, path: str | os.PathLike, metadata: Mapping[str, str], keep_features: bool = False
) -> FeatureStatistics:
    """
    Writes mean, covariance and count, as [`FeatureStatistics.load`] reads them.

    Args:
        collected ([`~evaluation.collect.CollectedFeatures`]): features of all images.
        path (`str` or `os.PathLike`): a `.safetensors`.
        metadata (`dict[str, str]`): written with them.
        keep_features (`bool`, *optional*, defaults to `False`): also write the features themselves, `(N, d)` in
            float32, as `"features"`: kernel distances, precision and recall need them.
    """
    statistics = collected.statistics(metadata)
    if not keep_features:
        statistics.save(path)
        return statistics
    d = statistics.dimension
    tensors: dict[str, tuple[tuple[int, ...], str, Iterable[np.ndarray]]] = {
        "covariance": ((d, d), "float64", [statistics.covariance.numpy()]),
        "mean": ((d,), "float64", [statistics.mean.numpy()]),
        "features": ((collected.count, d), "float32", collected.blocks()),
    }
    header = {"format": "pt", "count": json.dumps(statistics.count), "metadata": json.dumps(statistics.metadata)}
    stream_safetensors(path, tensors, header)
    return statistics
