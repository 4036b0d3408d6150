# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""From a folder, a Hub id or a pipeline to its policy."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ..pipelines.sit import SiTPipeline
from . import discrete_text, flow_text
from .base import DiffusionPolicy
from .class_conditional import ClassConditionalPolicy, DiTPolicy, UNetPolicy

# Pipelines that diffusers' own from_pretrained cannot find by name.
_PIPELINES = {"SiTPipeline": SiTPipeline}
# By the pipeline's name: diffusers imports a pipeline, and its text encoders, when it is first asked for.
_POLICIES: dict[str, Any] = {
    "SiTPipeline": ClassConditionalPolicy,
    "DiTPipeline": DiTPolicy,
    "DDPMPipeline": UNetPolicy,
    "DDIMPipeline": UNetPolicy,
    "LDMPipeline": UNetPolicy,
    "StableDiffusionPipeline": discrete_text.StableDiffusionPolicy,
    "StableDiffusionXLPipeline": discrete_text.StableDiffusionXLPolicy,
    "PixArtSigmaPipeline": discrete_text.PixArtSigmaPolicy,
    "StableDiffusion3Pipeline": flow_text.StableDiffusion3Policy,
    "SanaPipeline": flow_text.SanaPolicy,
    "FluxPipeline": flow_text.FluxPolicy,
    "QwenImagePipeline": flow_text.QwenImagePolicy,
    "ZImagePipeline": flow_text.ZImagePolicy,
    "Lumina2Pipeline": flow_text.Lumina2Policy,
}


def load_pipeline(name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a pipeline from a folder or the Hub, including those defined by this library.

    A Hub repository is downloaded first: diffusers resolves a third-party class only in a local folder.

    Args:
        name_or_path (`str`): folder, or Hub id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        kwargs: passed to `from_pretrained`, e.g. `torch_dtype`.

    Raises:
        FileNotFoundError: the folder has no `model_index.json`.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") != 1:
            raise FileNotFoundError(f"no folder {name_or_path}: pass a pipeline's folder or a Hub id 'org/name'.")
        folder = Path(snapshot_download(str(name_or_path), revision=revision))
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no model_index.json: it is not a saved diffusers pipeline.")
    class_name = json.loads(index.read_text())["_class_name"]
    pipeline = _PIPELINES.get(class_name, DiffusionPipeline).from_pretrained(str(folder), **kwargs)
    pipeline.register_to_config(_name_or_path=str(name_or_path))  # not the folder of the Hub's cache
    return pipeline


def as_policy(model: Any, guidance_scale: float = 1.0, **kwargs: Any) -> DiffusionPolicy:
    """
    The policy of a pipeline, folder or Hub id; a [`DiffusionPolicy`] is returned as it is.

    Args:
        model: pipeline, folder, Hub id or policy.
        guidance_scale (`float`, *optional*, defaults to 1.0): guidance, in training as in sampling; 1.0 is none.
        kwargs: further arguments of the family's policy, such as `height` and `offload_text_encoders`.

    Raises:
        TypeError: the pipeline's family is not known.
    """
    if isinstance(model, str | os.PathLike):
        model = load_pipeline(model)
    if isinstance(model, DiffusionPolicy):
        return model
    for cls in type(model).__mro__:
        if cls.__name__ in _POLICIES:
            return _POLICIES[cls.__name__](model, guidance_scale, **kwargs)
    known = ", ".join(_POLICIES)
    raise TypeError(
        f"{type(model).__name__} is not a pipeline this library knows ({known}): write a class with the members of "
        "trl_distreward.policies.DiffusionPolicy and pass an instance of it as `model`."
    )
