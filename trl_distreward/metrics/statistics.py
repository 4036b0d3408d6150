# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""First and second moments of feature vectors, accumulated in float64."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checks import check_features
from .npz import DAMAGES, array_names, open_archive, read_array
from .numpy_pickle import load_numpy_pickle

# names of feature spaces in EDM2's files, and of ADM's spatial features, as this library calls them
_EDM2_EXTRACTORS = {"fid": "inception", "fd_dinov2": "dinov2"}
SPATIAL = "inception-spatial"


@dataclass
class Moments:
    """A mean `(d,)` and a covariance `(d, d)` from a file, and what the file says of them."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)


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


def read_npz_moments(path: Path, extractor: str | None = None) -> Moments:
    """
    Moments from an `.npz` with arrays `mu` and `sigma`, as pytorch-fid, clean-fid, ADM, DiT, MAR and EDM write them.

    ADM's reference batches hold `mu_s` and `sigma_s` of spatial features as well, which are read for the extractor
    `"inception-spatial"`.
    """
    names = ("mu_s", "sigma_s") if extractor == SPATIAL else ("mu", "sigma")
    with open_archive(path) as archive:
        held = array_names(archive)
        if not set(names) <= set(held):
            also = " It holds images: give it as a source of images." if "arr_0" in held else ""
            raise ValueError(f"{path} holds {held}: a statistics file holds {names[0]!r} and {names[1]!r}.{also}")
        try:
            mean, covariance = (read_array(archive, name) for name in names)
        except DAMAGES as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
    return _moments(path, mean, covariance, metadata={"extractor": SPATIAL} if extractor == SPATIAL else {})


def read_edm2_moments(path: Path, extractor: str | None = None) -> Moments:
    """Moments from an EDM2 `.pkl`, which holds them for several extractors; by a reader that runs nothing."""
    content = load_numpy_pickle(path)
    content = content if isinstance(content, dict) else {}
    held = {name: content[key] for key, name in _EDM2_EXTRACTORS.items() if key in content}
    if not held:
        raise ValueError(f"{path} holds no statistics: an EDM2 file holds 'fid' or 'fd_dinov2', each a mu and sigma.")
    if extractor is None and len(held) > 1:
        raise ValueError(
            f"{path} holds statistics of {', '.join(held)}: say which, as feature_extractor={[*held][0]!r}."
        )
    name = extractor or next(iter(held))
    if name not in held:
        raise ValueError(f"{path} holds statistics of {', '.join(held)}, not of {name!r}: compute those of {name!r}.")
    entry, count = held[name], content.get("num_images")
    if not isinstance(entry, dict) or not {"mu", "sigma"} <= set(entry):
        raise ValueError(f"{path} holds no mu and sigma for {name!r}: it is not a statistics file of EDM2.")
    return _moments(path, entry["mu"], entry["sigma"], count, {"extractor": name})


def _moments(
    path: Path, mean: object, covariance: object, count: object = None, metadata: Mapping[str, str] | None = None
) -> Moments:
    if count is not None and not isinstance(count, int):
        raise ValueError(f"num_images={count!r} in {path} must be a whole number.")
    tensors = [_tensor(array, f"{name} in {path}") for name, array in (("mu", mean), ("sigma", covariance))]
    return Moments(tensors[0], tensors[1], count, {"source": path.name, **(metadata or {})})


def _tensor(array: object, name: str) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {kind}: it must be an array of floating-point numbers.")
    return torch.from_numpy(array.astype(np.float64))


def check_extractor(
    metadata: Mapping[str, str],
    dimension: int,
    *,
    extractor: str,
    resize: str | None = None,
    weights: str | None = None,
    extractor_dimension: int | None = None,
    path: object = "the statistics",
) -> None:
    """
    Raises `ValueError` where statistics with this `metadata` were not made by this extractor.

    Files of other tools do not name their extractor: only their dimension can be checked.

    Args:
        metadata (`dict[str, str]`), dimension (`int`): of the statistics.
        extractor (`str`), resize (`str`, *optional*), extractor_dimension (`int`, *optional*): of the extractor.
        weights (`str`, *optional*): digest of its network, as [`~metrics.extractors.network_digest`] gives it.
        path: named in the message.
    """
    remedy = f"recompute them with trl-distreward statistics {_as_option(extractor, resize)}"
    for name, value in (("extractor", extractor), ("resize", resize), ("weights", weights)):
        held = metadata.get(name)
        if held and value and held != value:
            raise ValueError(
                f"{path} has {name} {held!r}, but the images are seen with {value!r}: features of one cannot be "
                f"compared with those of the other: {remedy}."
            )
    if extractor_dimension is not None and dimension != extractor_dimension:
        raise ValueError(
            f"{path} has dimension {dimension}, but {extractor!r} gives {extractor_dimension}: they must be the same: "
            f"{remedy}."
        )


def _as_option(extractor: str, resize: str | None) -> str:
    """How an extractor is named on the command line; those of which more would have to be said are not spelt out."""
    name, _, output = extractor.partition("-")
    if name != "inception":
        return "and the --feature-extractor of the images, its options included"
    options = {"output": output, "resize": "" if resize in (None, "tensorflow") else resize}
    return ",".join(["--feature-extractor inception", *(f"{key}={value}" for key, value in options.items() if value)])
