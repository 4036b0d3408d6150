# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metadata of safetensors files that are already written."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import header_length, replace_file


def add_metadata(path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """
    Adds to the metadata of a safetensors file; its tensors are copied byte by byte, never loaded.

    Args:
        path (`str`): file, replaced when its successor is whole.
        metadata (`dict[str, str]`): entries to add or replace.
    """
    path = Path(path)

    def write(partial: Path) -> None:
        with open(path, "rb") as file, open(partial, "wb") as written:
            header = json.loads(file.read(header_length(file.read(8), str(path))))
            header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
            written.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, written, 1 << 24)

    replace_file(path, write)


def stamp_network(folder: str | os.PathLike, component: str | None, about: Mapping[str, Any]) -> None:
    """
    Makes every file of a pipeline's network say how it was made; those of any other component are none of it.

    Args:
        folder (`str`): saved pipeline.
        component (`str`, *optional*): the network's folder, e.g. `unet`; without one nothing is stamped.
        about (`dict`): what to say, each value written as JSON.
    """
    if component is None:
        return
    metadata = {name: json.dumps(value, default=str) for name, value in about.items()}
    for path in sorted(Path(folder, component).glob("*.safetensors")):
        add_metadata(path, metadata)
