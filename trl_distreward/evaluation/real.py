# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Real data in any form, and the statistics of real images, which are computed once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import constants
from torch import Tensor

from ..conditions import LABEL_COLUMNS, TEXT_COLUMNS
from ..metrics.distance import DISTANCES, Distance
from ..metrics.extractors import FeatureExtractor, describe_extractor, extract_features, freeze, move
from ..metrics.frechet import FrechetDistance
from ..metrics.kernel import KernelDistance
from ..metrics.scores import OF_STATISTICS, feature_metrics
from ..metrics.statistics import SPATIAL, FeatureStatistics, check_extractor, load_features
from .decoding import decode_image
from .features import LIBRARY, CollectedFeatures, collect_features, start_processes
from .sources import ImageSource, npz_names, open_images

RealSource: TypeAlias = FeatureStatistics | Tensor | np.ndarray | str | os.PathLike | Dataset | ImageSource

_ADM_RESIZE = "tensorflow"  # of ADM's reference batches, which do not name it


def build_distance(
    distance: str | Callable[..., Distance],
    source: RealSource,
    extractor: FeatureExtractor | None = None,
    resize: int | None = None,
) -> Distance:
    """Builds a distance to [`real_data`]: `"frechet"`, `"kernel"`, or a function of its features or statistics."""
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r} is unknown: choose one of {sorted(DISTANCES)}, or a function.")
        distance = DISTANCES[distance]
    built: Any = distance.func if isinstance(distance, partial) else distance
    real = real_data(source, extractor, features=built is not FrechetDistance, resize=resize)
    if built is FrechetDistance and isinstance(real, Tensor):
        real = FeatureStatistics.from_features(real)
    elif built is KernelDistance and not isinstance(real, Tensor):
        raise ValueError(f"{source} holds no features (M, d), which this distance needs: save them there too.")
    return distance(real)


def real_data(
    source: RealSource, extractor: FeatureExtractor | None, *, features: bool, resize: int | None = None
) -> FeatureStatistics | Tensor:
    """
    Brings real data in any form to features, if `features` are asked for and there are any, or to their statistics.

    All processes call it, and share the work on images. Statistics of images are kept in the folder `trl_distreward`
    of the Hugging Face cache, which all machines must share. They are computed anew if an image, `resize`, the
    extractor or this library changes, for which all images are read: write a statistics file of large sets.

    `source` is [`FeatureStatistics`]; features `(M, d)`; a statistics file; a folder or `.npz` of images; a dataset
    with one column of images; or an [`~evaluation.ImageSource`]. An `extractor` that needs conditions finds them in a
    column of the dataset; if it has a `name`, statistics must be of the same name, resize and weights. Images are
    cropped and resized to `resize`; without it all must have one size.
    """
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(source)
    if isinstance(source, Tensor):
        if source.ndim == 4:
            remedy = "pass their features, extractor(images), or a folder or datasets.Dataset of images"
            raise ValueError(f"real data of shape {tuple(source.shape)} are images: {remedy}.")
        return source
    if isinstance(source, FeatureStatistics):
        check_statistics(source, extractor)
        return source
    if isinstance(source, str | os.PathLike):
        statistics, held = read_statistics(Path(source), extractor, features)
        if statistics is not None:
            return statistics if held is None else held
        if not Path(source).exists():
            known = "statistics (.safetensors, .npz), a folder of images, or a dataset that load_dataset returned"
            raise FileNotFoundError(f"no file or folder {source}: give {known}.")
    assert extractor is not None
    if not isinstance(source, ImageSource):
        columns = LABEL_COLUMNS if hasattr(extractor, "num_classes") else TEXT_COLUMNS
        needed = getattr(extractor, "needs_conditions", False)
        source = open_images(source, prompt_column=columns if needed else None)
    state = start_processes()
    name = _identity(source, extractor, features, resize) if source.is_stored else uuid4().hex
    path = Path(constants.HF_HOME, "trl_distreward", f"{name}.safetensors")
    path, is_there = broadcast_object_list([path, path.is_file()])
    if not is_there:
        write_statistics(source, extractor, path, features=features, resize=resize)
    found = load_features(path) if features else FeatureStatistics.load(path)
    state.wait_for_everyone()
    if not source.is_stored and state.is_main_process:
        path.unlink()
    assert found is not None
    return found


def _identity(source: ImageSource, extractor: FeatureExtractor, features: bool, resize: int | None) -> str:
    """Digest of all that statistics depend on. An extractor's code shows only in what it makes of an image."""
    device, image = PartialState().device, next(iter(source.shard(0, 1)))
    move(freeze(extractor), device)
    pixels = torch.from_numpy(decode_image(image, resize))[None].to(device)
    probe = extract_features(extractor, pixels, None if image.prompt is None else [image.prompt])
    made_of = [source.digest(), describe_extractor(extractor), resize, features, probe.tolist(), LIBRARY]
    return hashlib.blake2b(json.dumps(made_of, default=str).encode(), digest_size=16).hexdigest()


def read_statistics(path: Path, extractor: object, features: bool) -> tuple[FeatureStatistics | None, Tensor | None]:
    """Statistics that a file holds, and features if asked for; `None` for what it does not hold."""
    name, names = getattr(extractor, "name", None), npz_names(path) if path.suffix == ".npz" else ()
    is_adm = name in ("inception", SPATIAL) and getattr(extractor, "resize", None) == _ADM_RESIZE
    if path.suffix not in (".npz", ".safetensors", ".pkl") or ("arr_0" in names and not (is_adm and "mu" in names)):
        return None, None
    statistics = FeatureStatistics.load(path, name)
    check_statistics(statistics, extractor, path)
    return statistics, load_features(path) if features else None


def check_statistics(statistics: FeatureStatistics, extractor: object, path: object = "the real data") -> None:
    """Raises `ValueError` if statistics are not of the features of an extractor that has a name."""
    if getattr(extractor, "name", None) is not None:
        held = {**statistics.metadata, "dimension": statistics.dimension}
        dimension = getattr(extractor, "dimension", None)
        check_extractor(held, {**describe_extractor(extractor), "dimension": dimension}, path)


class RealSet:
    """Real images in the features of one extractor; `options` are those of [`~evaluation.open_images`]."""

    def __init__(self, path: str | os.PathLike, extractor: FeatureExtractor, metrics: Sequence[str], **options: Any):
        self.path, self.extractor, self.metrics = Path(path), extractor, metrics
        self.needs_features = not {*metrics} <= {*OF_STATISTICS}
        self.statistics, self.features = read_statistics(self.path, extractor, self.needs_features)
        self.images: ImageSource | None = None
        if self.statistics is None or (self.needs_features and self.features is None):
            if self.path.suffix == ".safetensors":
                raise ValueError(f"{path} holds no features, which {', '.join(metrics)} need: use --features.")
            self.images = open_images(path, **options)

    def collect(self, folder: Path, **options: Any) -> None:
        """Computes from the images what no file holds. All processes call it; see [`collect_features`]."""
        if self.images is not None:
            collected = collect_features(self.images, {"real": self.extractor}, folder, **options)
            self.statistics = self.statistics or collected.statistics("real")
            self.features = collected.features("real") if self.needs_features else None

    def compare(self, generated: Tensor, other: FeatureStatistics | None, seed: int, spread: int) -> dict[str, object]:
        """Computes one of the results in a report from features `(N, d)`; see [`feature_metrics`]."""
        network: Any = self.extractor
        statistics: Any = self.statistics
        logits = network.logits(generated) if "inception_score" in self.metrics else None
        metrics: dict[str, float] = {}
        for real, of_statistics in ((statistics, True), (self.features, False)):
            names = [name for name in self.metrics if (name in OF_STATISTICS) == of_statistics]
            if names and real is not None:
                options: dict[str, Any] = {"logits": logits, "other_real": other, "seed": seed, "spread": spread}
                metrics |= feature_metrics(real, generated, names, **options)
        mean_norm = statistics.mean.norm().item()  # tells whether two reports are against the same data
        about = {"path": str(self.path), "count": statistics.count, "mean_norm": mean_norm}
        return {"extractor": network.name, "resize": network.resize, "real": about, "metrics": metrics}


def write_statistics(
    images: ImageSource,
    extractor: FeatureExtractor,
    output: str | os.PathLike,
    *,
    features: bool = False,
    work_dir: str | None = None,
    resize: int | None = None,
    **options: Any,
) -> CollectedFeatures:
    """Writes statistics of images. All processes call it; `options` go to [`~evaluation.collect_features`]."""
    state, folder = PartialState(), Path(work_dir or f"{output}.work")
    collected = collect_features(images, {"real": extractor}, folder, resize=resize, **options)
    if state.is_main_process:
        about = {**describe_extractor(extractor), **images.description, "image_resize": resize}
        about |= {"image_size": collected.image_size, "library": LIBRARY}
        metadata = {name: str(value) for name, value in about.items() if value is not None}
        statistics = collected.statistics("real", metadata)
        statistics.save(output, collected.features("real") if features else None)
        if work_dir is None:
            shutil.rmtree(folder)
    state.wait_for_everyone()
    return collected
