# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Real data in any form, and the statistics of real images, which are computed once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
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

from .. import __version__
from ..conditions import LABEL_COLUMNS, TEXT_COLUMNS
from ..metrics.distance import DISTANCES, Distance
from ..metrics.extractors import FeatureExtractor, describe_extractor, extract_features, freeze, move
from ..metrics.frechet import FrechetDistance
from ..metrics.kernel import KernelDistance
from ..metrics.statistics import SPATIAL, FeatureStatistics, check_extractor, load_features
from .decoding import decode_image
from .features import CollectedFeatures, collect_features, start_processes
from .sources import ImageSource, npz_names, open_images

RealSource: TypeAlias = FeatureStatistics | Tensor | np.ndarray | str | os.PathLike | Dataset | ImageSource

_ADM_RESIZE = "tensorflow"  # of ADM's reference batches, which do not name it


def build_distance(
    distance: str | Callable[..., Distance],
    source: RealSource,
    extractor: FeatureExtractor | None = None,
    resize: int | None = None,
) -> Distance:
    """
    Builds a distance to real data.

    Args:
        distance (`str` or `Callable`): `"frechet"`, `"kernel"`, or a function from the real data to a distance. A
            function gets features `(M, d)` where there are any, else [`FeatureStatistics`].
        source, extractor, resize: the real data, see [`real_data`].
    """
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
    of the Hugging Face cache, which all machines must share. They are computed anew if `resize`, the extractor or what
    it makes of the first image, or a file's name, size or time changes; and every time for a stream or a dataset that
    holds paths instead of images, whose changes would go unnoticed.

    Args:
        source: [`FeatureStatistics`]; features `(M, d)`, a tensor or an array; a statistics file; a folder or `.npz`
            of images; a dataset with one column of images; or an [`~evaluation.ImageSource`].
        extractor (`Callable`, *optional*): the extractor of images. One that needs conditions finds them in a column
            of the dataset. If it has a `name`, statistics must be of the same name, resize and weights.
        resize (`int`, *optional*): side to which images are cropped and resized; otherwise all must have one size.
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
        if holds_statistics(Path(source), extractor):
            statistics = FeatureStatistics.load(source, getattr(extractor, "name", None))
            check_statistics(statistics, extractor, source)
            held = load_features(source) if features else None
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
    name = _identity(source, extractor, features, resize) if source.is_fixed else uuid4().hex
    path = Path(constants.HF_HOME, "trl_distreward", f"{name}.safetensors")
    path, is_there = broadcast_object_list([path, path.is_file()])
    if not is_there:
        write_statistics(source, extractor, path, features=features, resize=resize)
    found = load_features(path) if features else FeatureStatistics.load(path)
    state.wait_for_everyone()
    if not source.is_fixed and state.is_main_process:
        path.unlink()
    assert found is not None
    return found


def _identity(source: ImageSource, extractor: FeatureExtractor, features: bool, resize: int | None) -> str:
    """Digest of all that statistics depend on. An extractor's code shows only in what it makes of an image."""
    device, image = PartialState().device, next(iter(source.shard(0, 1)))
    move(freeze(extractor), device)
    pixels = torch.from_numpy(decode_image(image, resize))[None].to(device)
    probe = extract_features(extractor, pixels, None if image.prompt is None else [image.prompt])
    made_of = [source.description, describe_extractor(extractor), resize, features, probe.tolist()]
    return hashlib.blake2b(json.dumps(made_of, default=str).encode(), digest_size=16).hexdigest()


def holds_statistics(path: Path, extractor: object) -> bool:
    """
    Whether a file holds statistics and not images. A reference batch of ADM holds images, and their statistics in its
    own Inception features.
    """
    if path.suffix != ".npz":
        return path.suffix in (".safetensors", ".pkl")
    held = npz_names(path)
    name, resize = getattr(extractor, "name", None), getattr(extractor, "resize", None)
    return "arr_0" not in held or ("mu" in held and name in ("inception", SPATIAL) and resize == _ADM_RESIZE)


def check_statistics(statistics: FeatureStatistics, extractor: object, path: object = "the real data") -> None:
    """Raises `ValueError` if statistics are not of the features of an extractor that has a name."""
    if getattr(extractor, "name", None) is not None:
        held = {**statistics.metadata, "dimension": statistics.dimension}
        dimension = getattr(extractor, "dimension", None)
        check_extractor(held, {**describe_extractor(extractor), "dimension": dimension}, path)


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
    """
    Writes the statistics of images, and their features if asked for, into a `.safetensors` file, and returns them. All
    processes call it; `resize` and `options` are those of [`~evaluation.collect_features`].
    """
    state, folder = PartialState(), Path(work_dir or f"{output}.work")
    collected = collect_features(images, {"real": extractor}, folder, resize=resize, **options)
    if state.is_main_process:
        about = {**describe_extractor(extractor), **images.description, "image_resize": resize}
        about["library"] = f"trl-distreward {__version__}, torch {version('torch')}, pillow {version('pillow')}"
        metadata = {name: str(value) for name, value in about.items() if value is not None}
        statistics = collected.statistics("real", metadata)
        statistics.save(output, collected.features("real") if features else None)
        if work_dir is None:
            shutil.rmtree(folder)
    state.wait_for_everyone()
    return collected
