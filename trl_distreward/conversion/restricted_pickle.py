# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Read pickles of EDM2 and of sharded states as inert records: nothing in the file is imported, called or executed.

Unpickling gives records of the names in the file and the arguments passed to them. Tensors and arrays are then read
from the bytes in these records.
"""

import io
import math
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import check_archive

# a value in a pickle: anything but an object of the classes that the file names
Value = Any


class Record:
    """Stands for an object: its class's name in the file, the arguments it would be made with, and its state."""

    args: tuple
    state: Value = None

    def __new__(cls, *args: Value) -> "Record":
        record = object.__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Value) -> None:
        self.state = state


class Items(dict):
    """Stands for a dictionary; attributes that are set on it become entries, as in `EasyDict`."""

    def __setstate__(self, state: Value) -> None:
        self.update(state)


_RECORDS = {
    "torch_utils.persistence": ["_reconstruct_persistent_obj"],
    "torch.nn.modules.container": ["ModuleDict", "ModuleList"],
    "torch._utils": ["_rebuild_parameter", "_rebuild_tensor_v2"],
    "torch.storage": ["_load_from_bytes"],
    "numpy": ["ndarray", "dtype"],
    "numpy.core.multiarray": ["_reconstruct"],
    "numpy._core.multiarray": ["_reconstruct"],
    # of a state that torch.distributed.checkpoint wrote
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))],
    "pathlib": ["PosixPath", "WindowsPath"],
}
GLOBALS: dict[tuple[str, str], type] = {
    ("dnnlib.util", "EasyDict"): Items,
    ("collections", "OrderedDict"): Items,
    **{(module, name): type(name, (Record,), {}) for module, names in _RECORDS.items() for name in names},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not one of the known names")
        return GLOBALS[module, name]


def load_records(path: Path) -> Value:
    """Reads the object in a pickle file as records; raises `pickle.UnpicklingError` for unknown names and damage."""
    try:
        with path.open("rb") as file:
            most = os.fstat(file.fileno()).st_size
            for opcode, argument, _ in pickletools.genops(file):
                if "PUT" in opcode.name and int(argument or 0) > most:  # room for so many objects would be made
                    raise pickle.UnpicklingError(f"it claims {argument} objects in {most} bytes")
            file.seek(0)
            return _Unpickler(file).load()
    except (pickle.UnpicklingError, FileNotFoundError):
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise pickle.UnpicklingError(f"it is damaged or no pickle ({type(error).__name__}: {error})") from error


def is_record(value: Value, *names: str) -> bool:
    """Whether a value is a record with one of these names."""
    return isinstance(value, Record) and type(value).__name__ in names


def read_tensor(value: Value) -> Tensor:
    """Returns the tensor that a record of a tensor or parameter describes, in memory of its own."""
    if is_record(value, "_rebuild_parameter"):
        value = value.args[0]
    if not is_record(value, "_rebuild_tensor_v2") or not is_record(value.args[0], "_load_from_bytes"):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is where a tensor should be")
    storage, offset, size, stride = value.args[:4]
    check_archive(io.BytesIO(storage.args[0]))
    found = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    flat = torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is made of {flat.numel()} values")
    if not flat.numel():
        return flat.view(size)
    return flat.as_strided(size, stride, offset).clone()  # checks the bounds


def read_array(value: Value) -> np.ndarray:
    """Returns the array of numbers that a record of a NumPy array describes, read-only."""
    if not is_record(value, "_reconstruct") or value.state is None:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is where an array should be")
    _, shape, dtype, fortran_order, data = value.state
    kind = np.dtype(dtype.state[1] + dtype.args[0])
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran_order else "C")


def check_sharded_state(folder: Path) -> None:
    """Raises `ValueError` if a state of torch.distributed.checkpoint, which unpickles freely, could run code."""
    for path in folder.glob("*.metadata"):
        try:
            content = load_records(path).state
            for index, place in content["storage_data"].items():
                if is_record(content["state_dict_metadata"][index.state["fqn"]], "BytesStorageMetadata"):
                    with open(path.parent / place.state["relative_path"], "rb") as file:
                        file.seek(place.state["offset"])
                        torch.load(io.BytesIO(file.read(place.state["length"])), weights_only=True)
        except Exception as error:  # a malformed pickle can raise anything
            raise ValueError(f"{folder} is damaged, or would run code if it were read: use another.") from error
