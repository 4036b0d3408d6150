# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""First and second moments of feature vectors, accumulated in float64, and the files that hold them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import check_archive, written_whole
from .checks import check_features

SPATIAL = "inception-spatial"  # name of ADM's spatial features, whose moments its reference batches hold too
# feature spaces in EDM2's files by extractor, and their resizes, which the files do not name
_EDM2_NAMES = {"inception": "fid", "dinov2": "fd_dinov2"}
_EDM2_RESIZE = {"inception": "tensorflow", "dinov2": "torch-bicubic-224"}
_MOST_DIMENSIONS = 2**14  # a covariance of 2 GiB
_ROUNDING = 1e-5  # relative to the largest value; float32 leaves 1e-6


class FeatureStatistics:
    """
    Count, mean `(d,)` and covariance `(d, d)` of a set of feature vectors, float64, the latter divided by `count - 1`.

    Features stream in through `update`, by the pairwise formula of Chan, Golub and LeVeque (1983). `metadata`
    describes the set and is saved with it. The count is `None` if the statistics come from a file that does not say.
    """

    def __init__(self, dimension: int, metadata: Mapping[str, str] | None = None):
        self.dimension = dimension
        self.count: int | None = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # sum of (x - mean)(x - mean)ᵀ
        self.metadata = dict(metadata or {})

    @classmethod
    def from_features(
        cls, features: Tensor | np.ndarray, metadata: Mapping[str, str] | None = None
    ) -> "FeatureStatistics":
        """Statistics of `features` of shape `(N, d)`; raises `ValueError` on NaN or infinite values."""
        features = torch.from_numpy(features) if isinstance(features, np.ndarray) else features
        statistics = cls(check_features(features).shape[1], metadata)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, count: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> "FeatureStatistics":
        """Statistics from a mean `(d,)` and a covariance `(d, d)` (divided by `count - 1`), if they are such."""
        if mean.ndim != 1 or not len(mean) or tuple(covariance.shape) != (len(mean), len(mean)):
            shapes = f"mean has shape {tuple(mean.shape)} and covariance {tuple(covariance.shape)}"
            raise ValueError(f"{shapes}: they must be (d,) and (d, d).")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite: the statistics file is damaged.")
        _check_covariance(covariance.double(), count)
        statistics = cls(len(mean), metadata)
        symmetric = (covariance.double() + covariance.double().T) / 2
        statistics.mean, statistics.count = mean.double().clone(), count
        statistics._scatter = symmetric if count is None else symmetric * (count - 1)
        return statistics

    @property
    def covariance(self) -> Tensor:
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 vectors; update() with more.")
        return self._scatter / (self.count - 1)

    @property
    def rank_bound(self) -> int:
        """Largest possible rank of the covariance: `count - 1` where that is below d."""
        return self.dimension if self.count is None else min(self.dimension, self.count - 1)

    def to(self, device: torch.device) -> "FeatureStatistics":
        """Moves the moments: later updates are computed on `device`."""
        self.mean, self._scatter = self.mean.to(device), self._scatter.to(device)
        return self

    def update(self, features: Tensor) -> None:
        """Adds `features` of shape `(N, d)`."""
        features = check_features(features, "features", self.dimension, least=1).double().to(self.mean.device)
        if self.count is None:
            raise ValueError("cannot add to statistics whose count is unknown: recompute them from the images.")
        total, mean = self.count + len(features), features.mean(dim=0)
        centred, delta = features - mean, mean - self.mean
        between = torch.outer(delta, delta) * (self.count * len(features) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self.mean = self.mean + delta * (len(features) / total)
        self.count = total

    def save(self, path: str | os.PathLike, features: Tensor | None = None) -> None:
        """Writes the moments, and `features` `(N, d)` if given, to a `.safetensors` file, whole or not at all."""
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} would be read as another format: give it the suffix .safetensors.")
        tensors = {"mean": self.mean.cpu().contiguous(), "covariance": self.covariance.cpu().contiguous()}
        if features is not None:
            tensors["features"] = features
        header = {"format": "pt", "count": json.dumps(self.count), "metadata": json.dumps(self.metadata)}
        header["digest"] = _digest(tensors, header)
        with written_whole(path) as file:
            file.write(save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike, feature_extractor: str | None = None) -> "FeatureStatistics":
        """
        Reads statistics of this library or of other tools. Nothing in the file is executed.

        The file is a `.safetensors` written by [`~FeatureStatistics.save`]; an `.npz` with `mu` and `sigma`, as
        pytorch-fid, clean-fid, ADM, DiT and MAR write them; or a `.pkl` of EDM2. `feature_extractor` chooses among
        several statistics in it, and must be the extractor that it names.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no statistics file at {path}.")
        read = {".npz": _read_npz, ".pkl": _read_edm2}.get(path.suffix, _read_safetensors)
        try:
            statistics = cls.from_moments(*read(path, feature_extractor))
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{path} cannot be read as statistics: {error}") from error
        if feature_extractor is not None:
            check_extractor(statistics.metadata, {"extractor": feature_extractor}, path)
        return statistics


Moments = tuple[Tensor, Tensor, int | None, dict[str, str]]  # mean, covariance, count and metadata


def _check_covariance(covariance: Tensor, count: int | None) -> None:
    """Raises `ValueError` for a matrix that no `count` vectors have as their covariance."""
    if count is not None and (not isinstance(count, int) or count < 2):
        raise ValueError(f"count={count!r} must be a whole number of at least 2, or None if it is unknown.")
    values = torch.linalg.eigvalsh(covariance)
    rounding = _ROUNDING * values.abs().max()
    if values[0] < -rounding or (covariance - covariance.T).abs().max() > rounding:
        found = f"has the eigenvalue {values[0]:.3g}, or is not symmetric"
        raise ValueError(f"the covariance {found}: recompute the statistics in float64.")
    rank = int((values > rounding).sum())
    if count is not None and rank >= count:
        raise ValueError(f"the covariance has rank {rank}, which needs more than {count} images: correct the count.")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a `.safetensors` file, unless they are not those that were written."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        width = max(file.get_slice("covariance").get_shape())
        if width > _MOST_DIMENSIONS:
            raise ValueError(f"its features have {width} dimensions: at most {_MOST_DIMENSIONS} can be compared.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    written = header.pop("digest", None)
    if written not in (None, _digest(tensors, header)):
        raise ValueError("it is damaged, as its digest shows: copy or compute it anew.")
    return tensors, header


def _read_safetensors(path: Path, extractor: str | None) -> Moments:
    tensors, header = _read_whole(path)
    about = json.loads(header.get("count", "null")), json.loads(header.get("metadata", "{}"))
    return tensors["mean"], tensors["covariance"], *about


def _read_npz(path: Path, extractor: str | None) -> Moments:
    names = ("mu_s", "sigma_s") if extractor == SPATIAL else ("mu", "sigma")
    check_archive(path)
    with np.load(path, allow_pickle=False) as archive:
        if not {*names} <= {*archive}:
            also = ", but images: give it as a source of images" if "arr_0" in archive else ""
            raise ValueError(f"it holds {archive.files}, not {names[0]!r} and {names[1]!r}{also}.")
        mean, covariance = (torch.from_numpy(archive[name].astype(np.float64)) for name in names)
    return mean, covariance, None, {"source": path.name, **({"extractor": SPATIAL} if extractor == SPATIAL else {})}


def _read_edm2(path: Path, extractor: str | None) -> Moments:
    """Moments from EDM2's reference statistics, which hold them by feature space."""
    from ..conversion.restricted_pickle import load_records, read_array

    content = load_records(path)
    names = [name for name, key in _EDM2_NAMES.items() if key in content]
    if extractor not in names and (extractor is not None or len(names) != 1):
        raise ValueError(f"it holds statistics of {names}, choose one as feature_extractor={extractor!r}.")
    name = extractor or names[0]
    arrays = (read_array(content[_EDM2_NAMES[name]][key]) for key in ("mu", "sigma"))
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    about = {"source": path.name, "extractor": name, "resize": _EDM2_RESIZE[name]}
    return mean, covariance, content.get("num_images"), about


def load_features(path: str | os.PathLike) -> Tensor | None:
    """Real features `(M, d)` that a `.safetensors` file holds beside their statistics; `None` without them."""
    if Path(path).suffix != ".safetensors":
        return None
    tensors, _ = _read_whole(Path(path))
    found = tensors.get("features")
    return None if found is None else check_features(found, f"features in {path}", len(tensors["mean"]), least=2)


def check_extractor(held: Mapping[str, object], seen: Mapping[str, object], path: object = "the real data") -> None:
    """Raises `ValueError` if real data is `held` in other features than images are `seen` with, if both say so."""
    for name, value in seen.items():
        if held.get(name) and value and held[name] != value:
            found = f"{path} has {name} {held[name]!r}, but the images are seen with {value!r}"
            raise ValueError(f"{found}: recompute the statistics with {seen['extractor']!r}.")
