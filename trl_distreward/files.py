# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all."""

import json
import os
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


def write_json(path: str | os.PathLike, content: object) -> None:
    """Writes JSON with one space of indentation, whole or not at all."""
    with written_whole(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
