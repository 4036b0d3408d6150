# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Arrays of `.npz` files, streamed without unpickling; declared sizes are checked before memory is allocated."""

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np

# exceptions that a damaged archive raises, depending on where the damage is
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


def open_archive(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens an `.npz` file; raises `ValueError` if it is no archive."""
    try:
        return zipfile.ZipFile(path)
    except DAMAGES as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}.") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(name.removesuffix(".npy") for name in archive.namelist())


def open_array(archive: zipfile.ZipFile, name: str) -> ArrayStream:
    """Reads the header of an array; raises `ValueError` if it holds Python objects or claims a wrong size."""
    member = archive.getinfo(name + ".npy")
    stream = archive.open(member)
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or dtype.names:
        raise ValueError(f"array {name!r} has dtype {dtype}: it must hold numbers")
    array = ArrayStream(stream, shape, dtype, fortran_order, stream.tell())
    if min(shape, default=0) < 0 or array.offset + array.num_bytes != member.file_size:
        raise ValueError(f"array {name!r} claims shape {shape} of {dtype}, but holds {member.file_size} bytes")
    return array


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    array = open_array(archive, name)
    values = np.frombuffer(array.stream.read(array.num_bytes), dtype=array.dtype)
    return values.reshape(array.shape, order="F" if array.fortran_order else "C")
