# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Where checkpoints come from, and what is kept of it."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, Protocol

from .files import INDEX, PICKLES, WEIGHTS, TensorSpec, find_weights, no_pickle, read_header, shards_of


class Source(Protocol):
    """A checkpoint's folder, here or on the Hub."""

    name: str
    file: str | None  # named by the user, relative to the folder
    names: Collection[str]

    def read_text(self, name: str) -> str: ...

    def header(self, name: str) -> dict[str, TensorSpec]: ...

    def path(self, name: str) -> Path:
        """The file on this machine, downloaded if need be."""
        ...

    def member(self, paths: Mapping[str, Path]) -> "PoolMember": ...


@dataclass(frozen=True)
class PoolFile:
    """
    A file of weights on this machine.

    Attributes:
        name (`str`): relative to the checkpoint's folder.
        path (`Path`): absolute.
        expected (`str`, *optional*): SHA-256 that the Hub announces.
    """

    name: str
    path: Path
    expected: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stat", self._now())

    def _now(self) -> tuple[int, ...]:
        stat = self.path.stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    @cached_property
    def sha256(self) -> str:
        """
        Of the file's bytes, read when first asked for.

        Raises:
            ValueError: the file is another one than was opened, or not the one that the Hub has.
        """
        with open(self.path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        if self._now() != self._stat:  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} was changed after the pool was opened: make the pool again.")
        if self.expected is not None and digest != self.expected:
            raise ValueError(
                f"{self.path} has SHA-256 {digest}, but the Hub has {self.expected}: delete the file from the cache "
                "and make the pool again."
            )
        return digest


@dataclass(frozen=True)
class PoolMember:
    """
    A checkpoint of a pool.

    Attributes:
        source (`str`): as it was asked for.
        files (`tuple[PoolFile]`): that hold its weights, each with `name`, `path` and `sha256`.
        path (`Path`, *optional*): absolute local folder or file, where it is local.
        repo_id (`str`, *optional*), revision (`str`, *optional*), subfolder (`str`):
            on the Hub; `revision` is the commit's hash, whatever was asked for.
    """

    source: str
    files: tuple[PoolFile, ...]
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""

    def describe(self) -> dict[str, Any]:
        """For metadata and model cards. Of a local path only the last two parts: the others are nobody's business."""
        files = {file.name: file.sha256 for file in self.files}
        if self.repo_id is not None:
            place = {"repo_id": self.repo_id, "revision": self.revision, "subfolder": self.subfolder}
            return {**place, "files": files}
        assert self.path is not None
        return {"path": "/".join(self.path.parts[-2:]), "files": files}


class LocalSource:
    """A folder, or one file of it."""

    def __init__(self, source: str):
        path = Path(source).expanduser()
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{source} is a link to {os.readlink(path)}, which does not exist.")
        self.name, self.asked = source, path.absolute()
        self.file: str | None = None
        if path.is_dir():
            self.folder = path.absolute()
            files = [
                *self.folder.iterdir(),
                *(file for sub in self.folder.iterdir() if sub.is_dir() for file in sub.iterdir()),
            ]
            self.names: Collection[str] = {
                file.relative_to(self.folder).as_posix() for file in files if not file.is_dir()
            }
        else:
            if path.name.endswith(PICKLES):
                raise ValueError(f"{source} cannot be merged. {no_pickle(path.name)}")
            if not path.name.endswith(WEIGHTS):
                raise ValueError(f"{source} is no checkpoint: name a folder, a .safetensors file or a {INDEX} file.")
            self.folder, self.file = path.absolute().parent, path.name
            self.names = {file.name for file in self.folder.iterdir() if not file.is_dir()}

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            broken = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
            raise FileNotFoundError(f"{path}{broken} is no file that can be read.")
        return path

    def read_text(self, name: str) -> str:
        return self.path(name).read_text()

    def header(self, name: str) -> dict[str, TensorSpec]:
        return read_header(self.path(name))

    def member(self, paths: Mapping[str, Path]) -> PoolMember:
        return PoolMember(self.name, tuple(PoolFile(name, path) for name, path in paths.items()), path=self.asked)


def read_layout(source: Source, component: str | None) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """
    Which file of a checkpoint holds each tensor, and what its header says of it; nothing else is read.

    Raises:
        ValueError, FileNotFoundError: see `find_weights`, `shards_of` and `parse_header`.
    """
    file = source.file or find_weights(source.names, component, source.name)
    if not file.endswith(INDEX):
        specs = source.header(file)
        layout = dict.fromkeys(specs, file)
    else:
        layout = shards_of(file, source.read_text(file), source.names, source.name)
        headers = {shard: source.header(shard) for shard in sorted({*layout.values()})}
        lost = [key for key, shard in layout.items() if key not in headers[shard]]
        if lost:
            raise ValueError(f"{layout[lost[0]]} of {source.name} lacks {lost[0]}, which {file} has there.")
        specs = {key: headers[shard][key] for key, shard in layout.items()}
    if not specs:
        raise ValueError(f"{file} of {source.name} has no tensors.")
    return layout, specs
