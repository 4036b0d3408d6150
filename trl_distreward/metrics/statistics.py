# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""First and second moments of feature vectors, accumulated in float64."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checks import check_features
from .statistics_files import Moments, check_extractor, read_edm2_moments, read_npz_moments


class FeatureStatistics:
    """
    Count, mean and covariance of a set of feature vectors.

    Features stream in through [`~FeatureStatistics.update`]; sets merge with [`~FeatureStatistics.merge`], by the
    pairwise update of Chan, Golub and LeVeque (1983), which does not cancel as a sum of squares would.

    Args:
        dimension (`int`): feature dimension d.
        metadata (`dict[str, str]`, *optional*): said of the set: extractor, dataset, resize…; saved with it.

    Attributes:
        count (`int` or `None`): number of vectors; `None` when the file that was read does not say.
        mean (`torch.Tensor` of shape `(d,)`, float64).
        covariance (`torch.Tensor` of shape `(d, d)`, float64): divided by `count - 1`.
    """

    def __init__(self, dimension: int, metadata: Mapping[str, str] | None = None):
        if dimension < 1:
            raise ValueError(f"dimension={dimension} must be at least 1.")
        self.count: int | None = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # sum of (x - mean)(x - mean)ᵀ
        self.metadata = dict(metadata or {})

    @classmethod
    def from_features(cls, features: Tensor, metadata: Mapping[str, str] | None = None) -> "FeatureStatistics":
        """Statistics of `features` of shape `(N, d)`; raises `ValueError` on NaN or infinite values."""
        features = check_features(features)
        statistics = cls(features.shape[1], metadata)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, count: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> "FeatureStatistics":
        """Statistics from a mean `(d,)` and a covariance `(d, d)` (divided by `count - 1`)."""
        if mean.ndim != 1 or tuple(covariance.shape) != (len(mean), len(mean)):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} and covariance {tuple(covariance.shape)}: "
                "they must be (d,) and (d, d)."
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite: the statistics file is damaged.")
        if count is not None and count < 2:
            raise ValueError(f"count={count}: a covariance needs at least 2 vectors.")
        statistics = cls(len(mean), metadata)
        symmetric = (covariance.double() + covariance.double().T) / 2
        statistics.mean, statistics.count = mean.double().clone(), count
        statistics._scatter = symmetric if count is None else symmetric * (count - 1)
        return statistics

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 vectors: update() with more.")
        return self._scatter / (self.count - 1)

    @property
    def rank_bound(self) -> int:
        """The most that the covariance's rank can be: `count - 1` where that is below d."""
        return self.dimension if self.count is None else min(self.dimension, self.count - 1)

    def update(self, features: Tensor) -> None:
        """Adds `features` of shape `(N, d)`."""
        features = check_features(features, dimension=self.dimension).to(self.mean.device)
        if len(features) == 0:
            return
        mean = features.mean(dim=0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the vectors that `other` counted, as if they had been seen here."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge statistics of dimension {other.dimension} into {self.dimension}.")
        if other.count:
            self._add(other.count, other.mean.to(self.mean.device), other._scatter.to(self.mean.device))
        elif other.count is None:
            raise ValueError("cannot merge statistics whose count is unknown: recompute them from the images.")

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count is None:
            raise ValueError("cannot add to statistics whose count is unknown: recompute them from the images.")
        total = self.count + count
        delta = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes a `.safetensors` file with mean, covariance, count and metadata; whole or not at all.

        Raises:
            ValueError: the path ends as a file of another format, as which it would be read.
        """
        path = Path(path)
        if path.suffix in (".npz", ".pkl"):
            raise ValueError(f"{path} would be a safetensors file: give it the suffix .safetensors.")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean.cpu().contiguous(), "covariance": self.covariance.cpu().contiguous()}
        metadata = {"format": "pt", "count": json.dumps(self.count), "metadata": json.dumps(self.metadata)}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike, feature_extractor: str | None = None) -> "FeatureStatistics":
        """
        Reads a `.safetensors` file written by [`~FeatureStatistics.save`], an `.npz` with arrays `mu` and `sigma` as
        pytorch-fid, clean-fid, ADM, DiT and MAR write them (their count is not recorded), or a `.pkl` of EDM2, by a
        reader that runs nothing.

        Args:
            path (`str` or `os.PathLike`): of the file.
            feature_extractor (`str`, *optional*): name of the extractor whose statistics are wanted: chosen from a
                file that holds several, refused where a file says that it holds another's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, holds something else, or is another extractor's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no statistics file at {path}.")
        if path.suffix in (".npz", ".pkl"):
            read = read_npz_moments if path.suffix == ".npz" else read_edm2_moments
            moments = read(path, feature_extractor)
        else:
            moments = _read_safetensors(path)
        try:
            statistics = cls.from_moments(moments.mean, moments.covariance, moments.count, moments.metadata)
        except ValueError as error:
            raise ValueError(f"{path} holds no statistics: {error}") from error
        if feature_extractor is not None:
            check_extractor(statistics.metadata, statistics.dimension, extractor=feature_extractor, path=path)
        return statistics

    def __repr__(self) -> str:
        return f"FeatureStatistics(dimension={self.dimension}, count={self.count}, metadata={self.metadata})"


def _read_safetensors(path: Path) -> Moments:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a statistics file of this library or is damaged: {error}") from error
    metadata = json.loads(header.get("metadata", "{}"))
    return Moments(mean, covariance, json.loads(header.get("count", "null")), metadata)
