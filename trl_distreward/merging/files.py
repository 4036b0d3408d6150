# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What the headers of safetensors files say, and which files of a folder hold a checkpoint's weights."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch

INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", INDEX)
# In the order of diffusers, transformers and peft
STEMS = ("diffusion_pytorch_model", "model", "adapter_model")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
LARGEST_HEADER = 100_000_000  # the format's own limit
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def header_length(start: bytes, name: str) -> int:
    """Length of a safetensors header, from the file's first eight bytes."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= LARGEST_HEADER:
        raise ValueError(f"{name} is no safetensors file: its header would have {length} bytes. Save it again.")
    return length


def parse_header(header: bytes, size: int | None, name: str) -> dict[str, TensorSpec]:
    """
    Tensors of a safetensors file by name.

    Args:
        header (`bytes`): the JSON after the first eight bytes.
        size (`int`, *optional*): size of the whole file, where it is known.
        name (`str`): of the file, for messages.

    Raises:
        ValueError: the header is not as the format has it, or the file is shorter or longer than it says.
    """
    tensors, end = {}, 0
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for key, entry in entries.items():
            shape, (first, last) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            dtype = DTYPES[entry["dtype"]]
            if min(shape, default=0) < 0 or last - first != prod(shape) * dtype.itemsize:
                raise ValueError(key)
            tensors[key], end = TensorSpec(shape, dtype), max(end, last)
    except KeyError as error:
        raise ValueError(f"{name} has a tensor of dtype {error}, which cannot be merged.") from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{name} has no valid safetensors header: save or download it again.") from None
    if size is not None and size != 8 + len(header) + end:
        raise ValueError(
            f"{name} has {size} bytes where its header says {8 + len(header) + end}: it was cut short or overwritten; "
            "save or download it again."
        )
    return tensors


def read_header(path: Path, name: str | None = None) -> dict[str, TensorSpec]:
    """Tensors of a safetensors file on disk; see `parse_header`."""
    name = str(path) if name is None else name
    with open(path, "rb") as file:
        header = file.read(header_length(file.read(8), name))
    return parse_header(header, path.stat().st_size, name)


def find_weights(names: Collection[str], component: str | None, source: str) -> str:
    """
    The file that holds a checkpoint's weights, or the index of its shards.

    Args:
        names (`list[str]`): files, relative to the checkpoint's folder, with `/` between folders.
        component (`str`, *optional*): folder of a pipeline; by default `transformer` or `unet`, whichever is there.
        source (`str`): of the checkpoint, for messages.

    Raises:
        FileNotFoundError: no weights in safetensors.
        ValueError: more than one file could be meant.
    """
    folders = {name.rpartition("/")[0] for name in names}
    folder = ""
    if component is not None and component in folders:
        folder = component
    elif "model_index.json" in names:
        networks = [name for name in ("transformer", "unet") if name in folders]
        if component is not None or len(networks) != 1:
            wanted = f"component={component!r} is not a folder of" if component else "a network must be chosen in"
            raise ValueError(
                f"{wanted} the pipeline {source}: pass component= one of {sorted(folders - {''})}, or name the folder."
            )
        folder = networks[0]
    prefix = f"{folder}/" if folder else ""
    here = [name.removeprefix(prefix) for name in names if name.rpartition("/")[0] == folder]
    safe = sorted(name for name in here if name.endswith(WEIGHTS))
    indexes = [name for name in safe if name.endswith(INDEX)]
    usual = [f"{stem}{ending}" for stem in STEMS for ending in WEIGHTS if f"{stem}{ending}" in safe]
    for found in (usual, indexes, safe):
        if len(found) == 1 and not re.search(r"-\d{5}-of-\d{5}\.safetensors$", found[0]):
            return prefix + found[0]
        if found:
            break
    where = f"{source}, folder {folder}," if folder else source
    if any(re.search(r"-\d{5}-of-\d{5}\.safetensors$", name) for name in safe) and not indexes:
        raise FileNotFoundError(f"{where} has shards but no {INDEX.lstrip('.')}: add it, or save the model again.")
    if safe:
        raise ValueError(f"{where} has several files of weights, {safe}: name one, e.g. {source}/{safe[0]}.")
    pickles = sorted(name for name in here if name.endswith(PICKLES))
    if pickles:
        raise FileNotFoundError(f"{where} holds its weights in {pickles[0]}. {no_pickle(pickles[0])}")
    elsewhere = sorted(name for name in names if name.endswith(WEIGHTS))
    hint = f"there are {elsewhere[:3]}: name the folder or file" if elsewhere else "check the path"
    raise FileNotFoundError(f"{where} has no safetensors weights; {hint}.")


def no_pickle(name: str) -> str:
    """Why a pickle is refused, and the way out."""
    return (
        f"{PurePosixPath(name).suffix} files are pickles, which run code as they are read: convert it once with "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )


def shards_of(index: str, text: str, names: Collection[str], source: str) -> dict[str, str]:
    """
    Which file holds each tensor, from the index of a sharded checkpoint.

    Raises:
        ValueError: the index is not as it should be, or names a file outside its folder.
        FileNotFoundError: a shard is missing.
    """
    folder = index.rpartition("/")[0]
    try:
        placed = dict(json.loads(text)["weight_map"])
        shards = sorted({*placed.values()})
        foreign = [name for name in shards if not re.fullmatch(r"[\w-][\w. -]*\.safetensors", name)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} of {source} has no valid weight_map: save the model again.") from None
    if not placed or foreign:
        raise ValueError(
            f"{index} of {source} names {foreign[:1] or 'nothing'}, which is no safetensors file beside it: shards "
            "must lie in the folder of their index."
        )
    paths = {key: f"{folder}/{shard}" if folder else shard for key, shard in placed.items()}
    missing = sorted({*paths.values()} - {*names})
    if missing:
        raise FileNotFoundError(f"{source} lacks {len(missing)} of {len(shards)} shards, e.g. {missing[0]}.")
    return paths


def check_alike(specs: Sequence[Mapping[str, TensorSpec]], names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a checkpoint differs from most of the others, or from the first where there is no majority.
    """
    kinds = [frozenset(spec.items()) for spec in specs]
    usual = max(kinds, key=lambda kind: (kinds.count(kind), kind == kinds[0]))
    odd = next((i for i, kind in enumerate(kinds) if kind != usual), None)
    if odd is None:
        return
    reference = kinds.index(usual)
    ours, theirs = specs[odd], specs[reference]
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    key = keys[0]
    raise ValueError(
        f"{names[odd]} is not like the other checkpoints: {key} is {ours.get(key, 'absent')} in it, but "
        f"{theirs.get(key, 'absent')} in {names[reference]} ({len(keys)} tensors differ): leave it out, or save it as "
        "the others were."
    )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name beside it, and gives it its name when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
