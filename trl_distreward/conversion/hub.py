# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Push a pipeline with the code of its classes, so that it loads where this library is not installed."""

import inspect
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi

from ..hub import with_retries


def code_of(pipeline: DiffusionPipeline) -> dict[str, bytes]:
    """Modules and a `model_index.json`, by which diffusers finds the classes with `trust_remote_code=True`."""
    index = json.loads(pipeline.to_json_string())
    index["_class_name"] = ["pipeline", type(pipeline).__name__]
    index.pop("_name_or_path", None)  # a folder of this machine
    files = {"pipeline.py": Path(inspect.getfile(type(pipeline))).read_bytes()}
    for name, part in pipeline.components.items():
        package, _, module = type(part).__module__.rpartition(".")
        if package.startswith(__package__.split(".")[0] + "."):
            files[f"{name}/{module}.py"] = Path(inspect.getfile(type(part))).read_bytes()
            index[name] = [module, type(part).__name__]
    return {**files, "model_index.json": (json.dumps(index, indent=2) + "\n").encode()}


def push_with_code(
    pipeline: DiffusionPipeline, folder: str | os.PathLike, repo_id: str, *, private: bool | None = None
) -> str:
    """Pushes a pipeline, saved in `folder`, with the code of its classes; returns the address of the commit."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    files: dict[str, str | bytes] = {path.relative_to(folder).as_posix(): str(path) for path in paths}
    files.update(code_of(pipeline))

    def push() -> str:
        api, operations = HfApi(), [CommitOperationAdd(name, content) for name, content in files.items()]
        created = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        message = f"Upload {type(pipeline).__name__}"
        return api.create_commit(created, operations, commit_message=message).commit_url

    return with_retries(push, f"pushing to {repo_id}", repo_id)
