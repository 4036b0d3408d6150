# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Sets of stored images: folders, ADM samples (`.npz`), datasets, and what `generate_shards` wrote.

A set is read in lanes, which processes share out and which resume one by one. Lanes and their batches depend on the
set and the batch size alone, so that any number of processes sees the same batches.
"""

import hashlib
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.npz import DAMAGES, ArrayStream, array_names, open_archive, open_array
from .decoding import StoredImage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SHARD_PATTERN = "images-*.npy"
SETTINGS = "settings.json"  # of a folder of work
_MAX_LANES = 64


class ImageSource(ABC):
    """
    A set of stored images.

    Attributes:
        description (`dict`): what is recorded of the set; work on it resumes only where this is the same.
    """

    description: dict[str, Any]

    @abstractmethod
    def num_lanes(self, batch_size: int) -> int:
        """Into how many parts the set is divided."""

    @abstractmethod
    def lane(self, index: int, batch_size: int, skip: int = 0) -> Iterator[Callable[[], StoredImage]]:
        """A lane's images but for the first `skip`, each still to be read."""


class IndexedImages(ImageSource):
    """A set whose images are read by number. Lanes are ranges of whole batches."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> StoredImage: ...

    def _lane_size(self, batch_size: int) -> int:
        return batch_size * -(-len(self) // (_MAX_LANES * batch_size))

    def num_lanes(self, batch_size: int) -> int:
        return -(-len(self) // self._lane_size(batch_size))

    def lane(self, index: int, batch_size: int, skip: int = 0) -> Iterator[Callable[[], StoredImage]]:
        size = self._lane_size(batch_size)
        for i in range(index * size + skip, min((index + 1) * size, len(self))):
            yield partial(self.read, i)


class FolderImages(IndexedImages):
    """The images of a folder and its subfolders, in the order of their paths."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.names = sorted(_image_names(self.folder))
        if not self.names:
            raise ValueError(
                f"{folder} holds no images: no file ends in {' '.join(IMAGE_SUFFIXES)}. For parquet or webdataset "
                "files, give 'parquet' or 'webdataset' as the source and their paths as data files."
            )
        files = digest_of_files({name: self.folder / name for name in self.names})
        self.description = {"source": str(folder), "images": len(self), "files": files}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> StoredImage:
        path = self.folder / self.names[index]
        return StoredImage(str(path), path.read_bytes())


def _version(path: Path) -> list[int]:
    """Size and time of change of a file, by which a file in its place is told from it."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is a link to a file that is not there: repair or remove it.") from error
    return [status.st_size, status.st_mtime_ns]


def digest_of_files(paths: Mapping[str, Path]) -> str:
    """Of files' names, sizes and times of change, in the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(paths):
        digest.update(f"{name} {_version(paths[name])}\n".encode())
    return digest.hexdigest()


def _image_names(folder: Path) -> Iterator[str]:
    """Links are followed, to each folder once: one may lead to a folder that it is in."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


class NpzImages(IndexedImages):
    """An ADM sample: `arr_0`, uint8 `(N, H, W, C)`, in an `.npz`, which is read as a stream and never held whole."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._archive = open_archive(self.path)
        self._array = self._open()
        shape, dtype = self._array.shape, self._array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or self._array.fortran_order:
            order = " in Fortran's order" if self._array.fortran_order else ""
            raise ValueError(
                f"{path}: arr_0 is {shape} of {dtype}{order}, but a sample is uint8 of shape (N, H, W, 3), values 0 "
                "to 255: convert it."
            )
        if shape[0] == 0:
            raise ValueError(f"{path} holds no images: arr_0 has shape {shape}.")
        self._next = 0
        self.description = {"source": str(path), "images": shape[0], "file": _version(self.path)}

    def _open(self) -> ArrayStream:
        names = array_names(self._archive)
        if "arr_0" not in names:
            raise ValueError(f"{self.path} holds {names}: a sample holds its images as 'arr_0'.")
        try:
            return open_array(self._archive, "arr_0")
        except DAMAGES as error:
            raise ValueError(f"{self.path} is damaged: {error}.") from error

    def __len__(self) -> int:
        return self._array.shape[0]

    def read(self, index: int) -> StoredImage:
        size = self._array.num_bytes // len(self)
        try:
            if index != self._next:  # backwards in a compressed archive: it is read from its beginning
                self._array.stream.seek(self._array.offset + index * size)
            values = self._array.stream.read(size)
        except (*DAMAGES, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged at image {index}: {error}.") from error
        if len(values) != size:
            raise ValueError(f"{self.path} is damaged: it ends within image {index} of {len(self)}.")
        self._next = index + 1
        pixels = np.frombuffer(values, np.uint8).reshape(self._array.shape[1:])
        return StoredImage(f"{self.path}, image {index}", pixels)

    def lane(self, index: int, batch_size: int, skip: int = 0) -> Iterator[Callable[[], StoredImage]]:
        for reading in super().lane(index, batch_size, skip):
            yield partial(_identity, reading())  # here and now: a stream is read in order


def _identity(stored: StoredImage) -> StoredImage:
    return stored


class ShardedImages(IndexedImages):
    """
    Images in `images-*.npy` files, uint8 `(n, H, W, C)`, as `generate_shards` writes them.

    Args:
        folder (`str` or `os.PathLike`): of the files, and of the settings that they were made with.

    Raises:
        ValueError: images are missing.
    """

    def __init__(self, folder: str | os.PathLike):
        self.settings = json.loads((Path(folder) / SETTINGS).read_text())
        self.paths = sorted(Path(folder).glob(SHARD_PATTERN))
        self._shards = [np.load(path, mmap_mode="r") for path in self.paths]
        count = sum(map(len, self._shards))
        if count != self.settings["num_images"]:
            raise ValueError(
                f"{folder} holds {count} of {self.settings['num_images']} images: run the command that makes them "
                "again; it goes on where it was. Processes must share the folder's file system."
            )
        self.description = {"images": count, **self.settings}

    def __len__(self) -> int:
        return self.settings["num_images"]

    def read(self, index: int) -> StoredImage:
        shard, row = divmod(index, len(self._shards[0]))
        return StoredImage(f"{self.paths[shard]}, image {row}", np.array(self._shards[shard][row]))


def is_shard_folder(path: Path) -> bool:
    return (path / SETTINGS).is_file() and any(path.glob(SHARD_PATTERN))


def is_image_folder(path: Path) -> bool:
    return path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file()


def open_images(source: str | os.PathLike, **dataset_options: Any) -> ImageSource:
    """
    The images of a folder, of an ADM sample (`.npz`), of shards that were generated, or of a dataset.

    Args:
        source (`str` or `os.PathLike`): a folder of images, an `.npz`, a folder that `datasets` saved, or else a name
            that `datasets.load_dataset` knows.
        dataset_options: of [`~evaluation.datasets.open_dataset`].

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no images, or is damaged.
    """
    path, given = Path(source), {k: v for k, v in dataset_options.items() if v is not None}
    if path.suffix != ".npz" and path.is_file():
        raise ValueError(f"{source} is a file: give a folder of images, an .npz, or a dataset.")
    checkpoints = path.glob("checkpoint-*/model_index.json")
    newest = max(checkpoints, key=lambda found: found.stat().st_mtime, default=None)
    if newest is not None:
        raise ValueError(
            f"{source} is the folder of a run, and its images are no set: name a pipeline, e.g. its newest checkpoint "
            f"{newest.parent}, or one of its folders of images."
        )
    if path.suffix == ".npz" or is_image_folder(path):
        if given:
            raise ValueError(f"{', '.join(given)}: options of a dataset, but {source} is a file or folder of images.")
        if path.suffix != ".npz":
            return ShardedImages(path) if is_shard_folder(path) else FolderImages(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {source}.")
        return NpzImages(path)
    if not path.exists() and (path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"no file or folder {source}.")
    from .datasets import open_dataset

    return open_dataset(str(source), **given)


def chain_lanes(source: ImageSource, batch_size: int) -> Iterator[Callable[[], StoredImage]]:
    """All images of a set, in order."""
    for index in range(source.num_lanes(batch_size)):
        yield from source.lane(index, batch_size)
