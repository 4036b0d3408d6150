# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reads pickles of EDM2's kind as inert records: nothing in the file is imported, called or executed.

Unpickling yields records of what the file names and passes; only then are tensors read out of them, from bytes the
file holds. Sizes the file claims are compared with what is there before anything is allocated.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


class Record:
    """What would have been an object: the name in the file, the arguments it was made with, and its state."""

    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        record = object.__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Items(dict):
    """A dictionary or a class of them; attributes set on it are entries, as `EasyDict` has it."""

    def __setstate__(self, state: Any) -> None:
        self.update(state)


def _records(*names: str) -> dict[tuple[str, str], type]:
    pairs = [tuple(name.rsplit(".", 1)) for name in names]
    return {(module, name): type(name, (Record,), {}) for module, name in pairs}


SNAPSHOT_GLOBALS: Mapping[tuple[str, str], type] = {
    ("dnnlib.util", "EasyDict"): Items,
    ("collections", "OrderedDict"): Items,
    **_records(
        "torch_utils.persistence._reconstruct_persistent_obj",
        "torch.nn.modules.container.ModuleDict",
        "torch.nn.modules.container.ModuleList",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
    ),
}
_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_STORAGE_GLOBALS: Mapping[tuple[str, str], type] = _records(*(f"torch.{name}" for name in _DTYPES))
# The layout that torch gives a storage inside a pickle
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Persistent(Record):
    """An object that the file refers to by an identifier."""


class _RecordUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, allowed: Mapping[tuple[str, str], type], persistent: bool):
        super().__init__(stream)
        self.allowed, self.persistent = allowed, persistent

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is none of the known names")
        return self.allowed[module, name]

    def persistent_load(self, identifier: Any) -> Record:
        if not self.persistent:
            raise pickle.UnpicklingError("it refers to an object outside of itself")
        return _Persistent(identifier)


def _load(stream: Any, allowed: Mapping[tuple[str, str], type], persistent: bool = False) -> Any:
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # the interpreter makes room for as many objects as the highest index says
        if opcode.name.endswith("PUT") and int(str(argument)) > count:
            raise pickle.UnpicklingError(f"it numbers an object {argument} after {count} operations")
    stream.seek(start)
    return _RecordUnpickler(stream, allowed, persistent).load()


def load_records(path: Path) -> Any:
    """
    The object in a pickle file, as records.

    Raises:
        pickle.UnpicklingError: a name outside [`SNAPSHOT_GLOBALS`], or a damaged file. No code of the file has run.
    """
    file: BinaryIO
    with path.open("rb") as file:
        try:
            # reads of a mapping end where the file does, whatever length the pickle claims
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _load(mapped, SNAPSHOT_GLOBALS)
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a malformed pickle can raise anything
            raise pickle.UnpicklingError(f"it is damaged or no pickle ({type(error).__name__}: {error})") from error


def is_record(value: Any, *names: str) -> bool:
    return isinstance(value, Record) and type(value).__name__ in names


def read_tensor(value: Any) -> Tensor:
    """The tensor or parameter that a record describes, in memory of its own."""
    if is_record(value, "_rebuild_parameter"):
        value = value.args[0]
    if not is_record(value, "_rebuild_tensor_v2"):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is where a tensor should be")
    storage, offset, size, stride = value.args[:4]
    flat = _read_storage(storage)
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is made of {flat.numel()} values")
    if not flat.numel():
        return flat.view(size)
    return flat.as_strided(size, stride, offset).clone()  # which checks the bounds


def _read_storage(value: Any) -> Tensor:
    """The flat tensor of a pickled storage: four pickles, its keys, its length and its values, to the last byte."""
    if not is_record(value, "_load_from_bytes"):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is where a storage should be")
    data = value.args[0]
    stream = io.BytesIO(data)
    magic, protocol, system = (_load(stream, {}) for _ in range(3))
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL or not system["little_endian"]:
        raise pickle.UnpicklingError("a storage is not in torch's little-endian layout")
    claim = _load(stream, _STORAGE_GLOBALS, persistent=True)
    keys = _load(stream, {})
    kind, storage_type, key, _, numel, view = claim.args[0]
    if kind != "storage" or keys != [key] or view is not None:
        raise pickle.UnpicklingError("a storage is not by itself")
    dtype = _DTYPES[storage_type.__name__]
    (length,) = struct.unpack("<q", stream.read(8))
    rest = len(data) - stream.tell()
    if not length == numel == rest / dtype.itemsize:
        raise pickle.UnpicklingError(f"a storage claims {max(length, numel)} values of {dtype} in {rest} bytes")
    return torch.frombuffer(bytearray(stream.read()), dtype=dtype) if rest else torch.empty(0, dtype=dtype)


def read_floats(value: Any) -> list[float]:
    """A float32 NumPy array of one dimension, as numbers."""
    if not is_record(value, "_reconstruct") or value.state is None:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is where an array should be")
    _, shape, dtype, _, data = value.state
    if dtype.args[0] != "f4" or dtype.state[1] != "<" or len(shape) != 1:
        raise pickle.UnpicklingError("an array is not a list of float32 numbers")
    return list(struct.unpack(f"<{shape[0]}f", data))
