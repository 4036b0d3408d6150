# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all, and archives that are no larger than they seem."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

State = dict[str, Any]  # of a checkpoint or a JSON file


@contextmanager
def written_whole(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that takes its name once it is complete; after an error, an earlier file of that name is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_archive(file: str | os.PathLike | IO[bytes]) -> None:
    """Raises `ValueError` for a zip archive that claims to be much larger unpacked; other files pass."""
    try:
        members = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is a damaged archive: {error}") from error
    for member in members:
        if member.file_size > max(2**20, 100 * member.compress_size):  # else 40 KB could take 10 GB of memory
            raise ValueError(f"its member {member.filename} claims {member.file_size} bytes: save it uncompressed")


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, content: object) -> None:
    """Writes JSON with one space of indentation, whole or not at all."""
    with written_whole(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
