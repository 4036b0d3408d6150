# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pushes a pipeline with the code of its classes, so that it loads where this library is not installed."""

import inspect
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi

from ..hub import with_retries


def code_of(pipeline: DiffusionPipeline) -> dict[str, bytes]:
    """
    The files that let `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` find a pipeline's classes.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): of this library, whose modules import only torch and diffusers.

    Returns:
        `dict[str, bytes]`: `pipeline.py`, each network's module in its component's folder, and the `model_index.json`
        that names them in place of the library's modules. Nothing for a pipeline of diffusers.
    """
    if not _is_ours(pipeline):
        return {}
    index = json.loads(pipeline.to_json_string())
    index["_class_name"] = ["pipeline", type(pipeline).__name__]
    index.pop("_name_or_path", None)  # a folder of this machine, if it was loaded from one
    files = {"pipeline.py": _source(pipeline)}
    for name, part in pipeline.components.items():
        if _is_ours(part):
            module = type(part).__module__.rsplit(".", 1)[1]
            files[f"{name}/{module}.py"] = _source(part)
            index[name] = [module, type(part).__name__]
    return {**files, "model_index.json": (json.dumps(index, indent=2) + "\n").encode()}


def _is_ours(part: object) -> bool:
    return type(part).__module__.startswith(__package__.split(".")[0] + ".")


def _source(part: object) -> bytes:
    return Path(inspect.getfile(type(part))).read_bytes()


def push_with_code(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """
    Pushes a saved pipeline in one commit, with the code of its classes: all of it arrives, or nothing.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): what is in `folder`.
        folder (`str`): where `save_pretrained` wrote it.
        repo_id (`str`): on the Hub; created if need be.
        private (`bool`, *optional*): whether a new repository is.
        token (`str`, *optional*): of the Hub; the one that is logged in by default.

    Returns:
        `str`: the commit's address.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as [`hub.with_retries`]; nothing was committed.
    """
    files: dict[str, bytes | Path] = {
        path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }
    files.update(code_of(pipeline))
    api, what = HfApi(token=token), f"pushing to {repo_id}"
    created = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True), what, repo_id)
    commit = with_retries(
        lambda: api.create_commit(
            created.repo_id,
            [CommitOperationAdd(name, str(data) if isinstance(data, Path) else data) for name, data in files.items()],
            commit_message=f"Upload {type(pipeline).__name__}",
        ),
        what,
        repo_id,
    )
    return commit.commit_url
