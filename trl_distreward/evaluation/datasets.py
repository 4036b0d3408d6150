# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images of a dataset, on disk or streamed; decoded here, so that every source is decoded alike."""

import glob
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import Dataset, Image, IterableDataset, load_dataset, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from .decoding import StoredImage, UnreadableImage
from .sources import _MAX_LANES, ImageSource, IndexedImages, digest_of_files


class DatasetImages(IndexedImages):
    """A dataset whose rows are read by number."""

    def __init__(
        self, dataset: Dataset, column: str, description: Mapping[str, Any], prompt_column: str | None = None
    ):
        self.rows = dataset.select_columns([name for name in (column, prompt_column) if name is not None])
        self.column, self.prompt_column = column, prompt_column
        self.description = {**description, "images": len(dataset), "fingerprint": dataset._fingerprint}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> StoredImage:
        name, row = f"row {index} of {self.description['source']}", self.rows[index]
        return stored_image(name, row[self.column], prompt_of(name, row, self.prompt_column))


class StreamedImages(ImageSource):
    """A dataset that is read as a stream; lanes are its files, or groups of them."""

    def __init__(
        self, dataset: IterableDataset, column: str, description: Mapping[str, Any], prompt_column: str | None = None
    ):
        self.rows = dataset.select_columns([name for name in (column, prompt_column) if name is not None])
        self.column, self.prompt_column = column, prompt_column
        self.description = {**description, "files": dataset.num_shards}

    def num_lanes(self, batch_size: int) -> int:
        return min(_MAX_LANES, self.rows.num_shards)

    def lane(self, index: int, batch_size: int, skip: int = 0) -> Iterator[Callable[[], StoredImage]]:
        rows = self.rows.shard(self.num_lanes(batch_size), index, contiguous=True)
        for i, row in enumerate(rows.skip(skip) if skip else rows, start=skip):
            name = f"row {i} of part {index} of {self.description['source']}"
            yield partial(stored_image, name, row[self.column], prompt_of(name, row, self.prompt_column))


def prompt_of(name: str, row: Mapping[str, Any], column: str | None) -> str | None:
    """A row's prompt, where there is a column of them; raises `ValueError` where it is none."""
    if column is None:
        return None
    if not isinstance(row[column], str):
        raise ValueError(f"{name} holds {row[column]!r} in {column!r}, not a prompt: each image has one string.")
    return row[column]


def stored_image(name: str, value: Any, prompt: str | None = None) -> StoredImage:
    """An image column's value, undecoded, with its prompt; raises [`UnreadableImage`] where it is none."""
    if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path")):
        shown = f"{name} ({value['path']})" if value.get("path") else name
        if value.get("bytes") is not None:
            return StoredImage(shown, value["bytes"], prompt)
        try:
            with fsspec.open(value["path"], "rb") as file:
                return StoredImage(shown, file.read(), prompt)
        except FileNotFoundError as error:
            raise _no_image(shown, "a path where there is no file") from error
    if isinstance(value, bytes):
        return StoredImage(name, value, prompt)
    if isinstance(value, list):
        return StoredImage(name, _pixels(name, value), prompt)
    raise _no_image(name, "nothing" if value is None else type(value).__name__)


def _no_image(name: str, held: str) -> UnreadableImage:
    return UnreadableImage(
        f"{name} holds {held}, not an image. Repair or remove it, or pass --skip-corrupt to go on without it."
    )


def _pixels(name: str, values: list) -> np.ndarray:
    """uint8 pixels of numbers in lists, where they lose nothing by it."""
    try:
        pixels = np.asarray(values)
    except ValueError as error:
        raise _no_image(name, "lists of different lengths") from error
    if pixels.size and np.issubdtype(pixels.dtype, np.integer) and 0 <= pixels.min() and pixels.max() <= 255:
        return pixels.astype(np.uint8)
    return pixels  # refused when it is decoded


def find_image_column(features: Mapping[str, Any] | None, column: str | None, source: str) -> str:
    """The column asked for, or the only one that holds images."""
    names = list(features or {})
    if column is not None:
        if names and column not in names:
            raise ValueError(f"image_column={column!r} is not in {source}, which has {names}: name one of them.")
        return column
    images = [name for name, feature in (features or {}).items() if isinstance(feature, Image)]
    if len(images) != 1:
        found = f"columns of images {images}" if images else "no column of images"
        raise ValueError(f"{source} has {found} among {names}: name one with --image-column.")
    return images[0]


def resolve_revision(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a dataset on the Hub is now; what was asked for where the Hub is out of reach."""
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (OfflineModeIsEnabled, HfHubHTTPError, HTTPError, OSError):
        return revision


def read_dataset(source: str, **kwargs: Any) -> Any:
    """
    A dataset from a folder that `datasets` saved, or else what `datasets.load_dataset` makes of its name and `kwargs`.

    Raises:
        OSError: it is neither here nor to be had.
    """
    folder = Path(source)
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return load_from_disk(source)
    try:
        return load_dataset(source, **kwargs)
    except OSError as error:  # FileNotFoundError and ConnectionError too
        raise OSError(
            f"the dataset {source} cannot be loaded ({error}): give the folder of one, or the id of one on the Hub, "
            "which must be within reach or in the cache."
        ) from error


def local_files(source: str, data_files: list[str] | None) -> str | None:
    """A digest of names, sizes and times of the files here that a dataset is read from, if there are any."""
    folder = Path(source)
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    paths += [Path(name) for pattern in data_files or () for name in glob.glob(pattern, recursive=True)]
    return digest_of_files({str(path): path for path in paths}) if paths else None


def open_dataset(
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    data_files: list[str] | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    prompt_column: str | None = None,
) -> ImageSource:
    """
    Args:
        source (`str`): folder that `datasets` saved, name on the Hub, or a format (`"webdataset"`, `"parquet"`) whose
            files `data_files` names.
        split (`str`, *optional*): needed where there are several.
        config, revision, data_files, streaming: as in `datasets.load_dataset`; the revision is recorded as a commit.
        image_column (`str`, *optional*): the only column of images by default.
        prompt_column (`str`, *optional*): of the images' prompts, for features that need them.
    """
    description: dict[str, Any] = {"source": source, "config": config, "data_files": data_files}
    if not Path(source).is_dir():
        revision = resolve_revision(source, revision) if data_files is None else revision
        description["revision"] = revision
    if streaming:  # a dataset on disk has a fingerprint
        description["local_files"] = local_files(source, data_files)
    rows = read_dataset(source, name=config, data_files=data_files, revision=revision, streaming=streaming)
    if isinstance(rows, Mapping):
        if split is None and len(rows) > 1:
            raise ValueError(f"{source} has the splits {', '.join(rows)}: name one with --split.")
        name = split or next(iter(rows))
        if name not in rows:
            raise ValueError(f"split={split!r} is not in {source}, which has {', '.join(rows)}.")
        rows, description = rows[name], {**description, "split": name}
    elif split is not None:
        raise ValueError(f"split={split!r}: {source} has no splits: leave it out.")
    column = find_image_column(rows.features, image_column, source)
    if prompt_column is not None and prompt_column not in (rows.features or [prompt_column]):
        raise ValueError(
            f"prompt_column={prompt_column!r} is not in {source}, which has {list(rows.features)}: name one of them."
        )
    if rows.features is None or isinstance(rows.features[column], Image):
        rows = rows.cast_column(column, Image(decode=False))
    description = {
        k: v for k, v in {**description, "column": column, "prompt_column": prompt_column}.items() if v is not None
    }
    kind = StreamedImages if isinstance(rows, IterableDataset) else DatasetImages
    return kind(rows, column, description, prompt_column)
