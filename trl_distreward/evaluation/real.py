# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The real data of an evaluation: statistics from a file, or the features of images."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..metrics.checks import load_real_features
from ..metrics.npz import array_names, open_archive
from ..metrics.statistics import SPATIAL, FeatureStatistics
from .collect import CollectedFeatures

# how images are resized in files that do not say it: EDM2's .pkl, and ADM's reference batches
_EDM2_RESIZES = {"inception": "tensorflow", "dinov2": "torch-bicubic-224"}
_ADM_RESIZE = "tensorflow"


@dataclass(frozen=True)
class RealData:
    """
    Real data in one feature space.

    Attributes:
        statistics ([`FeatureStatistics`]): for the Fréchet distance.
        features (`torch.Tensor` of shape `(N, d)` or `None`): for the other metrics, where there are any.
        path (`str`): where it is from.
    """

    statistics: FeatureStatistics
    features: Tensor | None
    path: str

    @property
    def description(self) -> dict[str, Any]:
        """With the norm of the mean, which tells whether two evaluations are against the same data."""
        statistics = self.statistics
        said = {name: value for name, value in statistics.metadata.items() if name in ("split", "revision")}
        return {"path": self.path, "count": statistics.count, "mean_norm": statistics.mean.norm().item()} | said


@dataclass(frozen=True)
class RealPath:
    """
    What a path holds of real data in an extractor's features.

    Attributes:
        moments (`bool`): a mean and a covariance: a statistics file, or an ADM reference batch, for Inception as ADM
            resizes its images.
        features (`bool`): the features beside them.
        images (`bool`): images, from which both can be made.
        resize (`str` or `None`): of the moments, where the kind of file tells it.
    """

    path: Path
    extractor: str
    moments: bool
    features: bool
    images: bool
    resize: str | None = None

    @classmethod
    def look_at(cls, path: str | os.PathLike, extractor: str, resize: str | None = None) -> "RealPath":
        """
        Args:
            path (`str` or `os.PathLike`): a file, a folder, or a dataset's name.
            extractor (`str`), resize (`str`, *optional*): of the extractor.

        Raises:
            FileNotFoundError: there is no such statistics file.
            ValueError: the file holds none of the three.
        """
        path = Path(path)
        if path.suffix in (".safetensors", ".pkl") and not path.is_file():
            raise FileNotFoundError(f"no statistics file at {path}.")
        if path.suffix == ".safetensors":
            names = _tensor_names(path)
            return cls(path, extractor, "mean" in names, "features" in names, False)._checked(names)
        if path.suffix == ".pkl":
            return cls(path, extractor, True, False, False, _EDM2_RESIZES.get(extractor))
        if path.suffix != ".npz" or not path.is_file():
            return cls(path, extractor, False, False, True)
        with open_archive(path) as archive:
            names = set(array_names(archive))
        moments, images = ("mu_s" if extractor == SPATIAL else "mu") in names, "arr_0" in names
        if images:  # whose moments are of Inception, with ADM's resize: of others they are made anew
            moments &= extractor in ("inception", SPATIAL) and resize in (None, _ADM_RESIZE)
        return cls(path, extractor, moments, False, images, _ADM_RESIZE if images else None)._checked(names)

    def _checked(self, names: set[str]) -> "RealPath":
        if not (self.moments or self.features or self.images):
            raise ValueError(
                f"{self.path} holds {sorted(names)}: for {self.extractor} there are neither statistics nor features "
                "nor images in it: give what trl-distreward statistics writes, or images."
            )
        return self

    def must_collect(self, needs_features: bool) -> bool:
        """Whether features of the images have to be made."""
        return self.images and (not self.moments or needs_features)

    def feature_count(self) -> int | None:
        """Of how many images the file has features, where it has any."""
        if not self.features:
            return None
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice("features").get_shape()[0]

    def moments_in_file(self) -> FeatureStatistics | None:
        if not self.moments:
            return None
        statistics = FeatureStatistics.load(self.path, self.extractor)
        if self.resize is not None:
            statistics.metadata["resize"] = self.resize
        return statistics

    def load(self, collected: CollectedFeatures | None, metadata: Mapping[str, str] | None = None) -> RealData:
        """
        Args:
            collected ([`~evaluation.collect.CollectedFeatures`] or `None`), metadata (`dict[str, str]`, *optional*):
                of the images, where features had to be made of them.
        """
        statistics = self.moments_in_file()
        if collected is not None:
            statistics = statistics or collected.statistics(metadata)
            return RealData(statistics, collected.features(), str(self.path))
        features = load_real_features(self.path) if self.features else None
        if statistics is None:
            assert features is not None  # look_at has seen to it
            statistics = FeatureStatistics.from_features(features)
        return RealData(statistics, features, str(self.path))


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a .safetensors file: {error}.") from error
