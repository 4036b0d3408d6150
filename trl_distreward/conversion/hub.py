# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Push a pipeline with the code of its classes, so that it loads where this library is not installed."""

import inspect
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi

from ..hub import with_retries

# What diffusers leaves out when it saves a pipeline that came with code
_SAVING = """

import inspect
import json
from pathlib import Path


def _save_with_code(self, save_directory, **kwargs):
    DiffusionPipeline.save_pretrained(self, save_directory, **kwargs)
    index = Path(save_directory, "model_index.json")
    entries = json.loads(index.read_text())
    for name, part in {"": self, **self.components}.items():
        if type(part).__module__.startswith("diffusers_modules."):
            file = Path(inspect.getfile(type(part)))
            Path(save_directory, name, file.name).write_bytes(getattr(part, "_code", None) or file.read_bytes())
            entries[name or "_class_name"] = [file.stem, type(part).__name__]
    index.write_text(json.dumps(entries, indent=2))


# now, as the next model's file and names will take the place of these
{0}._code, {0}.save_pretrained = Path(__file__).read_bytes(), _save_with_code
"""


def code_of(pipeline: DiffusionPipeline) -> dict[str, bytes]:
    """Modules and a `model_index.json`, by which diffusers finds the classes with `trust_remote_code=True`."""
    index = json.loads(pipeline.to_json_string())
    kind = type(pipeline)
    index["_class_name"] = ["pipeline", kind.__name__]
    index.pop("_name_or_path", None)  # a folder of this machine
    source = Path(inspect.getfile(kind)).read_text() + _SAVING.replace("{0}", kind.__name__)
    files = {"pipeline.py": source.encode()}
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
