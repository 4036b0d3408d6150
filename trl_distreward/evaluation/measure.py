# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated images against real ones, in one feature space."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..conditions import Conditions
from ..metrics.scores import FRECHET, feature_metrics
from ..metrics.statistics import FeatureStatistics, load_features
from .features import collect_features
from .real import check_statistics, holds_statistics
from .sources import ImageSource, open_images


class NamedExtractor(Protocol):
    """A feature extractor that says what its features are, see [`load_feature_extractor`]."""

    name: str
    resize: str

    def __call__(self, images: Tensor, conditions: Conditions | None = None) -> Tensor: ...


class RealSet:
    """
    Real images in the features of one extractor, for some [`feature_metrics`]. They come from a statistics file
    (`.safetensors`, `.npz`, or EDM2's `.pkl`), an ADM reference batch (`.npz`), or images for
    [`~evaluation.open_images`], which gets `options`.
    """

    def __init__(self, path: str | os.PathLike, extractor: NamedExtractor, metrics: Sequence[str], **options: Any):
        self.path, self.extractor, self.metrics = Path(path), extractor, metrics
        self.needs_features = not {*metrics} <= {*FRECHET, "inception_score"}
        self.statistics: FeatureStatistics | None = None
        if holds_statistics(self.path, extractor):
            self.statistics = FeatureStatistics.load(path, extractor.name)
            check_statistics(self.statistics, extractor, path)
        self.features: Tensor | None = None
        self.images: ImageSource | None = None
        if self.needs_features and self.path.suffix == ".safetensors":
            self.features = load_features(path)
            if self.features is None:
                raise ValueError(f"{path} holds no features, which {', '.join(metrics)} need: use --features.")
        elif self.needs_features or self.statistics is None:
            self.images = open_images(path, **options)

    def collect(self, folder: Path, **options: Any) -> None:
        """Computes from the images what no file holds. All processes call it; see [`collect_features`]."""
        if self.images is not None:
            collected = collect_features(self.images, {"real": self.extractor}, folder, **options)
            self.statistics = self.statistics or collected.statistics("real")
            self.features = collected.features("real") if self.needs_features else None

    def compare(self, generated: Tensor, seed: int, spread: int) -> dict[str, object]:
        """Computes one of the results in a report from features `(N, d)`; see [`feature_metrics`]."""
        statistics = self.statistics
        assert statistics is not None
        options: dict[str, Any] = {"seed": seed, "spread": spread}
        network: Any = self.extractor
        if "inception_score" in self.metrics:
            options["logits"] = network.logits(generated)
        metrics: dict[str, float] = {}
        features = statistics if self.features is None else self.features
        for real, of_moments in ((statistics, True), (features, False)):
            if names := [name for name in self.metrics if (name in FRECHET) == of_moments]:
                metrics |= feature_metrics(real, generated, names, **options)
        mean_norm = statistics.mean.norm().item()  # tells whether two reports are against the same data
        about = {"path": str(self.path), "count": statistics.count, "mean_norm": mean_norm}
        return {"extractor": self.extractor.name, "resize": self.extractor.resize, "real": about, "metrics": metrics}
