# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Loading pipelines, and finding their policies."""

import inspect
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download

from ..files import State
from ..hub import with_retries
from ..models.edm2 import EDM2UNet2DModel
from ..models.sit import SiTTransformer2DModel
from ..pipelines.edm2 import EDM2Pipeline
from ..pipelines.sit import SiTPipeline
from . import discrete_text, flow_text
from .base import DiffusionPolicy
from .class_conditional import ClassConditionalPolicy, DiTPolicy, EDM2Policy, UNetPolicy

# Pipelines that diffusers cannot find by name
_PIPELINES: dict[str, Any] = {"SiTPipeline": SiTPipeline, "EDM2Pipeline": EDM2Pipeline}
_NETWORKS: dict[str, Any] = {cls.__name__: cls for cls in (SiTTransformer2DModel, EDM2UNet2DModel)}
# By name, because diffusers imports a pipeline and its text encoders on first access
_POLICIES: dict[str, Any] = {
    "SiTPipeline": ClassConditionalPolicy,
    "EDM2Pipeline": EDM2Policy,
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
# Pipelines of networks; XPipeline is that of an XTransformer2DModel
_PIPELINE_OF = {
    "EDM2UNet2DModel": "EDM2Pipeline",
    "UNet2DModel": "DDPMPipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
}

Model: TypeAlias = str | os.PathLike | DiffusionPipeline | DiffusionPolicy


def load_pipeline(name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: object) -> DiffusionPipeline:
    """
    Loads a pipeline from a folder or the Hub, including the pipelines of this library.

    Code in the repository is never run: a pipeline of this library is loaded with the library's own classes.

    Args:
        name_or_path (`str`): folder, or Hub id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        kwargs: passed to `from_pretrained`, e.g. `dtype`.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") != 1:
            raise FileNotFoundError(f"no folder {name_or_path}: pass a pipeline's folder or a Hub id 'org/name'.")
        # downloaded first, because diffusers finds a third-party class only in a local folder
        asked = f"there is no folder {name_or_path} in {Path.cwd()}: if you meant one, correct its path. On the Hub"
        download = partial(snapshot_download, str(name_or_path), revision=revision)
        folder = Path(with_retries(download, asked, str(name_or_path)))
    parts = json.loads((folder / "model_index.json").read_text())
    class_name = parts["_class_name"]
    if isinstance(class_name, list) and class_name[-1] in _PIPELINES:
        pipeline = _without_its_code(folder, parts, **kwargs)
    else:
        pipeline = _PIPELINES.get(str(class_name), DiffusionPipeline).from_pretrained(str(folder), **kwargs)
    pipeline.register_to_config(_name_or_path=str(name_or_path))  # instead of a folder in the cache
    return pipeline


def _without_its_code(folder: Path, parts: State, **kwargs: object) -> DiffusionPipeline:
    """Loads a folder that carries a copy of this library's code, without running that code."""
    arguments = {name: kwargs.pop(name) for name in parts if name in kwargs}
    for name, value in parts.items():
        if name in arguments or name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str | None):
            if value[1] is not None:
                part_class = _NETWORKS.get(value[1]) or getattr(diffusers, value[1])
                arguments[name] = part_class.from_pretrained(str(folder), subfolder=name, **kwargs)
        else:
            arguments[name] = value
    return _PIPELINES[parts["_class_name"][-1]](**arguments)


def source_of(policy: DiffusionPolicy) -> str | None:
    """Returns the folder or Hub id that a policy's pipeline was loaded from, if it says so."""
    source = getattr(getattr(policy, "pipeline", None), "config", {}).get("_name_or_path")
    return None if source is None else str(source)


def as_policy(model: Model, guidance_scale: float = 1.0, **kwargs: object) -> DiffusionPolicy:
    """
    Finds the policy for a pipeline, folder or Hub id; a [`DiffusionPolicy`] stays. `guidance_scale` and `kwargs` are
    arguments of the family's policy. Raises `TypeError` for a network without its pipeline, or an unknown family.
    """
    if isinstance(model, str | os.PathLike):
        model = load_pipeline(model)
    if isinstance(model, DiffusionPolicy):
        return model
    for cls in type(model).__mro__:
        if cls.__name__ in _POLICIES:
            policy = _POLICIES[cls.__name__]
            known = {name for base in policy.__mro__ for name in inspect.signature(base.__init__).parameters}
            for name in kwargs.keys() - known:
                raise ValueError(f"{name}={kwargs[name]!r}: {policy.__name__} has no argument {name}.")
            return policy(model, guidance_scale, **kwargs)
    kind = type(model).__name__
    pipeline = _PIPELINE_OF.get(kind, kind.replace("Transformer2DModel", "Pipeline"))
    if pipeline in _POLICIES:
        raise TypeError(f"{kind} is a network: pass a pipeline with it.\n{_wrapping(model, pipeline)}")
    members = [*DiffusionPolicy.__annotations__, *(name for name in vars(DiffusionPolicy) if name[0] != "_")]
    if len(missing := [name for name in members if not hasattr(model, name)]) < len(members) / 2:
        raise TypeError(f"{kind} lacks {', '.join(missing)}: a policy has all members of DiffusionPolicy.")
    found = f"{kind} is not a pipeline this library knows ({', '.join(_POLICIES)})"
    raise TypeError(f"{found}: pass an object with the members of trl_distreward.policies.DiffusionPolicy.")


def _wrapping(network: ModelMixin, name: str) -> str:
    """Two lines of code that make the pipeline `name` of a bare network."""
    if network.config.get("addition_embed_type") == "text_time":
        name = "StableDiffusionXLPipeline"
    library, given = "diffusers", f"{_POLICIES[name].component}=network"
    made = f"{name}.from_pretrained({network.config.get('_name_or_path', 'ORG/NAME')!r}, {given})"
    if name in _PIPELINES:
        library, made = "trl_distreward", f"{name}({given})  # and vae=..., if it generates latents"
    elif name == "DDPMPipeline":
        made = f"{name}({given}, scheduler=diffusers.DDPMScheduler())  # with the noise levels of its training"
    return f"    import {library}\n    model = {library}.{made}"
