# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Files too large to be held in memory, written as they come; whole or not at all."""

import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..files import written_whole

_SAFETENSORS_NAMES = {"float32": "F32", "float64": "F64"}


def stream_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[tuple[int, ...], str, Iterable[np.ndarray]]],
    metadata: Mapping[str, str],
) -> None:
    """
    Writes a `.safetensors` file, at no time holding more than one block of a tensor.

    Args:
        path (`str` or `os.PathLike`): of the file.
        tensors (`dict`): name to shape, dtype (`"float32"` or `"float64"`) and blocks of rows.
        metadata (`dict[str, str]`): of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype, _) in tensors.items():
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values are to be aligned
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, blocks in tensors.values():
            for block in blocks:
                file.write(np.ascontiguousarray(block, np.dtype(dtype).newbyteorder("<")).tobytes())
        if file.tell() != 8 + len(text) + offset:
            raise ValueError(f"{path}: the blocks hold {file.tell() - 8 - len(text)} bytes, the shapes {offset}.")


def save_sample_npz(
    path: str | os.PathLike, images: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None = None
) -> None:
    """
    Writes a sample as ADM does: `arr_0`, uint8 `(N, H, W, 3)`, and the labels as `arr_1`, neither compressed.

    Args:
        path (`str` or `os.PathLike`): of the `.npz`.
        images (`Iterable[np.ndarray]`): blocks `(n, H, W, 3)`, in order.
        shape (`tuple[int, ...]`): of them together.
        labels (`np.ndarray` of shape `(N,)`, *optional*): classes.
    """
    with written_whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for block in images:
                member.write(np.ascontiguousarray(block, np.uint8).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64))
