# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Arrays of `.npz` files, checked before any memory is taken: nothing in them is executed."""

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np

# what a damaged archive raises, depending on where the damage is
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


@dataclass
class ArrayStream:
    """An array of an `.npz` whose values are still to be read, in order, from `stream`."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # of the values, in the stream

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def array_names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(name.removesuffix(".npy") for name in archive.namelist())


def open_array(archive: zipfile.ZipFile, name: str) -> ArrayStream:
    """
    The header of an array, and where its values begin.

    Raises:
        ValueError: the array holds Python objects, or its shape is not that of its values.
    """
    member = archive.getinfo(name + ".npy")
    stream = archive.open(member)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array {name!r} is of format version {version}, which no array of numbers needs")
    if dtype.hasobject or dtype.names:
        raise ValueError(f"array {name!r} is of dtype {dtype}, not of numbers")
    array = ArrayStream(stream, shape, dtype, fortran_order, stream.tell())
    if min(shape, default=0) < 0 or array.offset + array.num_bytes != member.file_size:
        raise ValueError(f"array {name!r} claims shape {shape} of {dtype}, but holds {member.file_size} bytes")
    return array


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    array = open_array(archive, name)
    values = array.stream.read(array.num_bytes)
    if len(values) != array.num_bytes:
        raise ValueError(f"array {name!r} ends after {len(values)} of {array.num_bytes} bytes")
    order = "F" if array.fortran_order else "C"
    return np.frombuffer(values, dtype=array.dtype).reshape(array.shape, order=order)  # type: ignore[call-overload]


def open_archive(path: str | os.PathLike) -> zipfile.ZipFile:
    """Raises `ValueError` naming the file where it is no archive."""
    try:
        return zipfile.ZipFile(path)
    except DAMAGES as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}.") from error
