# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A diffusers pipeline seen as a velocity: what the trainers know of a generator."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from .models.edm2 import EDM2UNet2DModel
from .models.sit import SiTTransformer2DModel
from .pipelines.edm2 import EDM2Pipeline
from .pipelines.sit import SiTPipeline
from .sampling import Generators, gaussian_noise


@runtime_checkable
class DiffusionPolicy(Protocol):
    """
    What a trainer needs of a generator. A new pipeline family is one class with these members.

    `model` is also an argument of `velocity`, so that the wrapped, reference, averaged and merged networks share one
    path. Samples are float32 tensors `(B, ...)` on the path `x_t = (1-t) x_0 + t x_1`, data at `t = 0`.

    Attributes:
        model (`torch.nn.Module`): the network that is trained.
        num_conditions (`int` or `None`): number of classes, where conditions are class labels.
    """

    model: nn.Module
    num_conditions: int | None

    def to(self, device: torch.device) -> None:
        """Moves what is not trained, such as a VAE; the trainer moves the network."""
        ...

    def check_conditions(self, conditions: Any) -> None:
        """Raises `ValueError` for conditions the model does not know."""
        ...

    def encode(self, conditions: Any) -> dict[str, Tensor]:
        """Conditions as tensors whose first dimension is the batch."""
        ...

    def noise(self, conditions: Any, generator: Generators = None) -> Tensor:
        """Starting noise `(B, ...)` at `t = 1`."""
        ...

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """`x_1 - x_0` as `model` predicts it at `x (B, ...)`, `t (B,)`; guidance included; float32."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [0, 1], float32."""
        ...

    def save_pretrained(self, path: str | os.PathLike, model: nn.Module | None = None) -> None:
        """Writes a folder that loads as a pipeline, with `model` in place of the trained network if given."""
        ...

    def read_weights(self, path: str | os.PathLike) -> Mapping[str, Tensor]:
        """The trained network's state dict from such a folder, in CPU memory."""
        ...


class ClassConditionalPolicy:
    """
    Policy of a class-conditional pipeline; conditions are integer labels. A subclass serves another than SiT's.

    The pipeline predicts the velocity, decodes, and checks guidance; its network's config tells classes and shape.

    Args:
        pipeline ([`SiTPipeline`]): generator; its network is trained, all else, such as a VAE, frozen.
        guidance_scale (`float`, *optional*, defaults to 1.0): guidance, in training as in sampling.
        guidance_channels (`int`, *optional*): guide so many of the first channels only; SiT's own code guides 3 of 4.
    """

    component = "transformer"  # the pipeline's name for the network that is trained
    guides_channels = True  # whether the pipeline can guide some channels only

    def __init__(self, pipeline: Any, guidance_scale: float = 1.0, guidance_channels: int | None = None):
        pipeline.check_guidance(guidance_scale)
        network = getattr(pipeline, self.component)
        config = network.config
        self.pipeline = pipeline
        if guidance_channels is not None and not self.guides_channels:
            raise ValueError(
                f"guidance_channels={guidance_channels}: {type(pipeline).__name__} guides all channels; leave it None."
            )
        if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
            raise ValueError(
                f"guidance_channels={guidance_channels} must lie in 1 to {config.in_channels}, the model's channels."
            )
        self.guidance_scale = guidance_scale
        self.guidance_channels = guidance_channels
        self.model: nn.Module = network
        self._network_class = type(network)  # FSDP puts its own in place
        self.num_conditions: int | None = max(config.num_classes, 1)  # all one class without classes
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        for part in self._frozen_parts():
            part.requires_grad_(False).eval()

    def _frozen_parts(self) -> list[nn.Module]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name != self.component and isinstance(part, nn.Module)]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> None:
        for part in self._frozen_parts():
            part.to(device)

    def check_conditions(self, conditions: Any) -> None:
        labels, count = torch.as_tensor(conditions), self.num_conditions or 1
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"class labels have shape {tuple(labels.shape)}, {labels.dtype}: pass a list of integers."
            )
        if len(labels) and not (labels.min() >= 0 and labels.max() < count):
            raise ValueError(
                f"class labels span {labels.min().item()} to {labels.max().item()}, but this model has {count} "
                f"classes: labels must lie in 0 to {count - 1}."
            )

    def encode(self, conditions: Any) -> dict[str, Tensor]:
        return {"class_labels": torch.as_tensor(conditions, device=self.device).long()}

    def noise(self, conditions: Any, generator: Generators = None) -> Tensor:
        return gaussian_noise((len(conditions), *self.sample_shape), generator, self.device, torch.float32)

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        labels = cond["class_labels"]
        partial = (self.guidance_channels,) if self.guides_channels else ()
        return self.pipeline.predict_velocity(model, x, t, labels, self.guidance_scale, *partial).float()

    def decode(self, x: Tensor) -> Tensor:
        return self.pipeline.decode(x)

    def save_pretrained(self, path: str | os.PathLike, model: nn.Module | None = None) -> None:
        trained = getattr(self.pipeline, self.component)
        try:
            setattr(self.pipeline, self.component, trained if model is None else model)
            self.pipeline.save_pretrained(path)
        finally:
            setattr(self.pipeline, self.component, trained)

    def read_weights(self, path: str | os.PathLike) -> Mapping[str, Tensor]:
        return self._network_class.from_pretrained(path, subfolder=self.component).state_dict()


class EDM2Policy(ClassConditionalPolicy):
    """Policy of an [`EDM2Pipeline`]; its guider stays as it is."""

    component = "unet"
    guides_channels = False


# Pipelines that diffusers' own from_pretrained cannot find by name.
_PIPELINES: dict[str, Any] = {"SiTPipeline": SiTPipeline, "EDM2Pipeline": EDM2Pipeline}
_NETWORKS: dict[str, Any] = {cls.__name__: cls for cls in (SiTTransformer2DModel, EDM2UNet2DModel)}
_POLICIES = {SiTPipeline: ClassConditionalPolicy, EDM2Pipeline: EDM2Policy}


def load_pipeline(name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a pipeline from a folder or the Hub, including those defined by this library.

    A Hub repository is downloaded first: diffusers resolves a third-party class only in a local folder. Of one that
    carries its own code for others to load, the weights are taken and the code is not run.

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
    parts = json.loads(index.read_text())
    class_name = parts["_class_name"]
    if isinstance(class_name, list) and class_name[-1] in _PIPELINES:
        pipeline = _without_its_code(folder, parts, **kwargs)
    else:
        known = _PIPELINES.get(class_name) if isinstance(class_name, str) else None
        pipeline = (known or DiffusionPipeline).from_pretrained(str(folder), **kwargs)
    pipeline.register_to_config(_name_or_path=str(name_or_path))  # not the folder of the Hub's cache
    return pipeline


def _without_its_code(folder: Path, parts: dict[str, Any], **kwargs: Any) -> DiffusionPipeline:
    """A pipeline of this library from a folder that carries a copy of its code, by the library's own classes."""
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


def as_policy(model: Any, guidance_scale: float = 1.0, guidance_channels: int | None = None) -> DiffusionPolicy:
    """
    The policy of a pipeline, folder or Hub id; a [`DiffusionPolicy`] is returned as it is.

    Args:
        model: what is sampled.
        guidance_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance; 1.0 is none.
        guidance_channels (`int`, *optional*): guide so many of the first channels only, where the family can.

    Raises:
        TypeError: the pipeline's family is not known.
    """
    if isinstance(model, str | os.PathLike):
        model = load_pipeline(model)
    if isinstance(model, DiffusionPolicy):
        return model
    for pipeline_class, policy_class in _POLICIES.items():
        if isinstance(model, pipeline_class):
            partial = {} if guidance_channels is None else {"guidance_channels": guidance_channels}
            return policy_class(model, guidance_scale, **partial)
    known = ", ".join(cls.__name__ for cls in _POLICIES)
    raise TypeError(
        f"{type(model).__name__} is not a pipeline this library knows ({known}): write a class with the members of "
        "trl_distreward.policies.DiffusionPolicy and pass an instance of it as `model`."
    )


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8 in [0, 255], rounding as image files are written."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
