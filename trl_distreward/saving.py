# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Folders of models: saved whole or not at all, and without anything that belongs to this machine."""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline

from .files import write_json
from .hub import without_tokens

INDEX = "model_index.json"  # of a pipeline: its class and its parts
_CONFIGS = ("*config.json", INDEX, "training_args.json")  # not vocabularies, which are large and name nobody
_BESIDE = {"adapter", "coefficients.json"}  # what saves write beside a pipeline's parts


@contextmanager
def saved_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Gives an empty folder for a model, which takes the place of the one in `folder` once it is complete. All parts of
    the old model go, other files stay. After an error the old model is as it was. It may be the one that is being
    saved.
    """
    folder = Path(folder)
    partial, replaced = folder / "_partial-model", folder / "_replaced-model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (path for pattern in _CONFIGS for path in partial.rglob(pattern)):
            write_json(path, without_machine(json.loads(path.read_text())))
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.mkdir()
        _exchange(partial, folder, replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, folder: Path, replaced: Path) -> None:
    """Moves the old model out and the new one in, or leaves all in its place."""
    names = {path.name for path in new.iterdir()}
    old = {path.name for path in folder.iterdir()} & (names | _BESIDE | _parts(folder / INDEX))
    # a process that is killed in between leaves a folder without an index, rather than parts of two models
    moves = [(folder / name, replaced / name) for name in sorted(old, key=lambda name: name != INDEX)]
    moves += [(new / name, folder / name) for name in sorted(names, key=lambda name: name == INDEX)]
    with ExitStack() as undo:
        for source, target in moves:
            os.replace(source, target)
            undo.callback(os.replace, target, source)
        undo.pop_all()


def _parts(index: Path) -> set[str]:
    try:
        return {name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)}
    except (OSError, ValueError, AttributeError):  # there is none, or it is damaged
        return set()


def code_of(pipeline: DiffusionPipeline) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """Reads the modules that came with a pipeline, and the entries of its index that name their classes."""
    files: dict[str, bytes] = {}
    entries = {}
    for name, part in {"": pipeline, **pipeline.components}.items():
        if type(part).__module__.startswith("diffusers_modules."):
            module = Path(inspect.getfile(type(part)))  # a copy, beside those of other models
            origin = Path(str(getattr(getattr(part, "config", None), "_name_or_path", "")))
            found = origin.glob("*.py") if (origin / module.name).is_file() else [module]
            files |= {f"{name}/{path.name}".lstrip("/"): path.read_bytes() for path in found}
            entries[name or "_class_name"] = [module.stem, type(part).__name__]
    return files, entries


def add_code(folder: Path, files: dict[str, bytes], entries: dict[str, list[str]]) -> None:
    """Adds modules to a saved pipeline, so that it loads again. None of them is run."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if entries:
        write_json(folder / INDEX, json.loads((folder / INDEX).read_text()) | entries)


def without_machine(value: object) -> object:
    """Shortens the paths of this machine in a JSON value to their last names, and hides tokens of the Hub."""
    if isinstance(value, dict):
        return {key: without_machine(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_machine(entry) for entry in value]
    if not isinstance(value, str | os.PathLike):
        return value
    text, path = os.fspath(value), Path(value)
    local = text.startswith(("~", "./", "../")) or (path.is_absolute() and len(path.parts) > 2)
    return without_tokens(path.name if local or ("/" in text and os.path.exists(text)) else text)
