# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Sets of stored images: folders, ADM samples (`.npz`) and datasets. A set is read in shards, which depend on the set and
the batch size alone, so any number of processes sees the same batches.
"""

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from tqdm.auto import tqdm

from ..conditions import find_column
from .decoding import StoredImage, read_content

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageSource:
    """`count` images that `read` returns by number. Unfinished work goes on if the `description` is unchanged."""

    in_workers = True  # whether the worker processes of a DataLoader may read the images
    is_stored = True  # whether images can be read again

    def __init__(self, description: dict[str, object], count: int, read: Callable[[int], StoredImage]):
        self.description, self.count, self.read = description, count, read

    def digest(self) -> str:
        """Digest of all images and prompts, in order. Decoding will say why one cannot be read."""
        digest = hashlib.blake2b(digest_size=16)
        for stored in map(self.read, tqdm(range(self.count), "Looking for changed images", leave=False, delay=5)):
            with suppress(Exception):
                content = read_content(stored.content)
                digest.update(repr([np.shape(content), len(content), stored.prompt]).encode() + bytes(content))
        return digest.hexdigest()

    def _shard_size(self, batch_size: int) -> int:
        return batch_size * min(64, -(-self.count // (64 * batch_size)))

    def num_shards(self, batch_size: int) -> int:
        """Number of parts that the set is read in."""
        return -(-self.count // self._shard_size(batch_size))

    def shard(self, index: int, batch_size: int) -> Iterator[StoredImage]:
        """Images of one part, in order."""
        size = self._shard_size(batch_size)
        return map(self.read, range(index * size, min((index + 1) * size, self.count)))


class StreamedImages(ImageSource):
    """A dataset that is read as a stream. A shard is one of its files."""

    is_stored = False

    def __init__(self, rows: IterableDataset, columns: list[str], description: dict[str, object]):
        self.rows, self.columns = rows, columns
        self.description = {**description, "files": rows.num_shards}

    def num_shards(self, batch_size: int) -> int:
        return self.rows.num_shards

    def shard(self, index: int, batch_size: int) -> Iterator[StoredImage]:
        name, number = f"file {index} of {self.description['source']}", 0
        # iter(rows) would give each worker of a DataLoader only a part
        for rows in self.rows.shard(self.rows.num_shards, index).iter(batch_size):
            for cells in zip(*map(rows.get, self.columns), strict=True):
                yield StoredImage(f"row {number} of {name}", *cells)
                number += 1


def open_images(
    source: str | os.PathLike | Dataset | IterableDataset,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    data_files: list[str] | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    prompt_column: str | Sequence[str] | None = None,
) -> ImageSource:
    """
    Opens a set of images: a folder of images, an ADM sample (`.npz`), a folder that `datasets` saved, the name of a
    dataset on the Hub, a format (`"webdataset"`, `"parquet"`) whose files `data_files` names, or a dataset.

    Of a dataset, `split` is needed if there are several, and `image_column` if more than one column holds images.
    `prompt_column` is the column of prompts, or its possible names. For the others see `datasets.load_dataset`.
    """
    description: dict[str, object] = {"source": "the dataset"}
    if isinstance(source, Dataset | IterableDataset):
        rows = source
    else:
        path = Path(source)
        if path.suffix == ".npz":
            try:
                return _open_npz(path)
            except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, struct.error) as error:
                raise ValueError(f"{path} is no sample of images: {error}") from error
        if path.is_dir() and not _is_saved_dataset(path):
            if any(path.glob("checkpoint-*")):  # its sample grids are not what is to be measured
                raise ValueError(f"{path} is the output folder of a run: name a pipeline in it, or other images.")
            return _open_folder(path)
        if path.is_file() or (not path.exists() and str(source).startswith((".", "/"))):
            raise FileNotFoundError(f"no folder {source}: name a folder of images, an .npz file or a dataset.")
        options = {"name": config, "revision": revision, "data_files": data_files, "streaming": streaming}
        rows, split = read_dataset(str(source), split, **options)
        description = {"source": str(path), "split": split, **options}
    names, name = list(rows.features or []), str(description["source"])
    if not names:
        raise ValueError(f"{name} does not say its columns: pass map the features, e.g. features=dataset.features.")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError(f"{name} has a transform, and images are read as stored: use map, or with_format(None).")
    found = [name for name in names if isinstance(rows.features[name], Image)]
    if not isinstance(prompt_column, str | None):
        prompt_column = find_column(names, prompt_column, "the images' conditions")
    columns = ([image_column] if image_column else found) + ([prompt_column] if prompt_column else [])
    if len(columns) != 1 + bool(prompt_column) or not set(columns) <= set(names):
        held = f"{name} has the columns {', '.join(names)}, of which {', '.join(found) or 'none'} hold images"
        raise ValueError(f"{held}: name one with --image-column, and one of prompts if they are needed.")
    # without a format, so that images of all sources are decoded alike
    rows = rows.with_format(None).select_columns(columns)
    if columns[0] in found:
        rows = rows.cast_column(columns[0], Image(decode=False))
    description["columns"] = columns
    if isinstance(rows, IterableDataset):
        return StreamedImages(rows, columns, description)
    if not len(rows):
        raise ValueError(f"{name} is empty: give one with images.")
    description |= {"images": len(rows), "fingerprint": rows._fingerprint}
    return ImageSource(description, len(rows), partial(_read_row, rows, columns, name))


def _read_row(rows: Dataset, columns: list[str], source: str, index: int) -> StoredImage:
    row = rows[index]
    return StoredImage(f"row {index} of {source}", *map(row.get, columns))


def read_dataset(source: str, split: str | None, **options: object) -> tuple[Dataset | IterableDataset, str | None]:
    """Reads one split of a dataset, from a folder or with `datasets.load_dataset`; also returns the split's name."""
    try:
        rows = load_from_disk(source) if _is_saved_dataset(Path(source)) else load_dataset(source, **options)
    except OSError as error:  # FileNotFoundError and ConnectionError are subclasses
        raise OSError(f"dataset {source} cannot be loaded ({error}): name a folder, or an id on the Hub.") from error
    if not isinstance(rows, DatasetDict | IterableDatasetDict):
        return rows, None
    split = next(iter(rows)) if split is None and len(rows) == 1 else split
    if split not in rows:
        raise ValueError(f"split={split!r} is not in {source}: choose one of {', '.join(rows)}.")
    return rows[split], split


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _open_folder(folder: Path) -> ImageSource:
    """Images of a folder and its subfolders, in the order of their paths; hidden files are left out."""
    paths = sorted(map(str, _walk(folder, {os.path.realpath(folder)})))
    if not paths:
        raise ValueError(f"{folder} holds no images ({' '.join(IMAGE_SUFFIXES)}): name others by --data-files.")
    description = {"source": str(folder), "images": len(paths), "files": _state_of(paths)}
    return ImageSource(description, len(paths), partial(_read_file, paths))


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Images in a folder, and links to folders that were already read: no image counts twice, no loop is endless."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield from [path] if path.name.lower().endswith(IMAGE_SUFFIXES) else []
        elif os.path.realpath(path) in seen:
            yield path
        else:
            seen.add(os.path.realpath(path))
            yield from _walk(path, seen)


def _read_file(paths: Sequence[str], index: int) -> StoredImage:
    return StoredImage(paths[index], paths[index])


def _state_of(paths: Sequence[str | Path]) -> str:
    """Digest of the files' names, sizes and times, by which replaced files are noticed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        state = os.stat(path) if os.path.exists(path) else os.lstat(path)  # of a link that dangles
        digest.update(os.fsencode(f"{path} {state.st_size} {state.st_mtime_ns}\n"))
    return digest.hexdigest()


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an `.npz` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(name.removesuffix(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}.") from error


def _open_npz(path: Path) -> ImageSource:
    """An ADM sample: `arr_0`, uint8 `(N, H, W, 3)`, in an uncompressed `.npz` file, which is mapped into memory."""
    names = npz_names(path)
    if "arr_0" not in names:
        raise ValueError(f"it holds {names}, and a sample its images as 'arr_0'.")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        member, start = archive.getinfo("arr_0.npy"), stream.tell()
    if dtype != np.uint8 or len(shape) != 4 or fortran_order or 0 in shape:
        raise ValueError(f"it holds {shape} of {dtype}, and a sample uint8 of shape (N, H, W, 3).")
    if member.compress_type != zipfile.ZIP_STORED or start + math.prod(shape) != member.file_size:
        raise ValueError("it is compressed or damaged: save it with numpy.savez.")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # where the local header has the lengths of the two fields at its end
        offset = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4))) + start
    pixels = np.memmap(path, np.uint8, "r", offset, shape)
    description = {"source": str(path), "images": len(pixels), "files": _state_of([path])}
    return ImageSource(description, len(pixels), partial(_read_pixels, path, pixels))


def _read_pixels(path: Path, pixels: np.ndarray, index: int) -> StoredImage:
    return StoredImage(f"{path}, image {index}", np.array(pixels[index]))
