# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pickles of dictionaries, numbers and numpy arrays, read without running anything that they name."""

import io
import math
import os
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class _DType:
    """Stands for `numpy.dtype` while a pickle is read."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: Any, *_: Any):
        if kind not in _KINDS:
            raise pickle.UnpicklingError(f"dtype {kind!r} is not one of numbers")
        self.kind = kind
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"byte order {order!r} is unknown")
        self.order = order

    def __call__(self) -> np.dtype:
        return np.dtype(self.order + self.kind)


class _Array:
    """Stands for a `numpy.ndarray` while a pickle is read; its memory is that of the pickle's bytes."""

    __slots__ = ("value",)

    def __init__(self, *_: Any):  # numpy names a class, a shape and a type, to be overwritten by the state
        self.value = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, values = state
        self.value = _array(values, dtype, shape, "F" if fortran_order else "C")


def _array(values: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(values, bytes | bytearray) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array is not made of bytes and a dtype")
    if not all(isinstance(size, int) and 0 <= size < 2**40 for size in shape):
        raise pickle.UnpicklingError("an array claims sizes that none has")
    kind = dtype()
    if math.prod(shape) * kind.itemsize != len(values):
        raise pickle.UnpicklingError(f"an array claims shape {shape} of {kind}, but holds {len(values)} bytes")
    return np.frombuffer(values, dtype=kind).reshape(shape, order=order)


def _scalar(dtype: Any, values: Any) -> Any:
    return _array(values, dtype, ()).item()


def _encode(text: Any, encoding: Any) -> bytes:  # bytes in pickles of protocol 2
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"text in encoding {encoding!r} is not numpy's")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}


def _load_bytearray(unpickler: Any) -> None:
    (size,) = struct.unpack("<Q", unpickler.read(8))
    values = bytearray(unpickler.read(size))  # what is there, where Python makes room for what is claimed
    if len(values) != size:
        raise pickle.UnpicklingError(f"it claims {size} bytes and holds {len(values)}")
    unpickler.append(values)


class BoundedUnpickler(pickle._Unpickler):
    """
    Takes memory in proportion to the bytes of a pickle that is in memory, whatever it claims.

    It is Python's own implementation: C's can be made to take memory for a memo of 2³² entries by a pickle of nine
    bytes.
    """

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray}


class _Unpickler(BoundedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which numbers do not need")
        if isinstance(stand_in, str):
            return stand_in
        # a pickle may set attributes of what it is given: a new function each time, which nobody else holds
        return lambda *arguments: stand_in(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def _plain(value: Any, done: dict[int, dict]) -> Any:
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, dict):
        return value
    if id(value) not in done:  # one that is held in many places, itself included, is looked at once
        done[id(value)] = copied = {}
        copied.update({key: _plain(item, done) for key, item in value.items()})
    return done[id(value)]


def load_numpy_pickle(path: str | os.PathLike) -> Any:
    """
    What a pickle of dictionaries, numbers and numpy arrays holds.

    Raises:
        ValueError: it asks for anything else, or is damaged. Nothing that it names has been imported or called.
    """
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        return _plain(_Unpickler(content).load(), {})
    except Exception as error:  # a malformed pickle trips the machine that reads it in any of its instructions
        raise ValueError(f"{path} is refused: {error!s} ({type(error).__name__}).") from error
