# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The interface between trainers and generators, and the base class for diffusers pipelines."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..conditions import Conditions
from ..sampling import Generators, gaussian_noise
from ..saving import add_code, code_of


@runtime_checkable
class DiffusionPolicy(Protocol):
    """
    The members a generator needs to be trained. A new pipeline family is one class with these members.

    Samples are float32 tensors `(B, ...)` on the path `x_t = (1-t) x_0 + t x_1`, with data at `t = 0`. `velocity`
    takes the network as an argument, because wrapped, initial, averaged and merged networks take its place.

    Four members are optional. `grid(num_steps)` returns the times of the model's own sampler, from noise to 0, and
    the scale of its starting noise, for `time_grid="auto"`; `solver` names its ODE solver. `velocity_at_data = False`
    says that the model has no velocity at `t = 0`, which the solver `"dopri5"` needs. `unguided_velocity`, see
    [`PipelinePolicy`], is what the estimators on the forward process train in place of `velocity`.
    """

    model: nn.Module  # the trained network
    num_conditions: int | None  # number of classes if conditions are class labels, `None` for prompts

    def to(self, device: torch.device) -> None:
        """Moves everything but the network, such as a VAE; the trainer moves the network."""

    def check_conditions(self, conditions: Conditions) -> None:
        """Raises `ValueError` for conditions that the model does not know."""

    def encode(self, conditions: Conditions) -> dict[str, Tensor]:
        """Encodes conditions as tensors whose first dimension is the batch."""

    def noise(self, conditions: Conditions, generator: Generators = None) -> Tensor:
        """Draws starting noise `(B, ...)` at `t = 1`."""

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Predicts `x_1 - x_0` at `x (B, ...)` and `t (B,)`, guidance included, in float32."""

    def decode(self, x: Tensor) -> Tensor:
        """Decodes samples to images `(B, C, H, W)` in [0, 1], float32."""

    def save_pretrained(self, path: str | os.PathLike, model: nn.Module | None = None) -> None:
        """Writes a folder that loads as a pipeline; `model`, if given, takes the place of the trained network."""

    def read_weights(self, path: str | os.PathLike) -> Mapping[str, Tensor]:
        """Reads the network's state dict from such a folder, into CPU memory."""


class PipelinePolicy:
    """
    Base class for diffusers pipelines, of which only the denoising network is trained. A family defines `inputs` and
    `predict`. `guidance_scale` is that of classifier-free guidance, `v_∅ + scale (v - v_∅)`; 1.0 is none.
    """

    component = "transformer"  # the pipeline's name for the trained network
    velocity_at_data = True
    num_conditions: int | None = None
    sample_shape: tuple[int, ...]

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0):
        self.pipeline = pipeline
        self.guidance_scale = guidance_scale
        self.model: nn.Module = getattr(pipeline, self.component)
        self.config = self.model.config
        plain = getattr(self.model, "_orig_mod", self.model)  # within torch.compile's wrapper
        # remembered, because FSDP puts a class of its own in place
        self._network_class = type(plain.get_base_model() if isinstance(plain, PeftModel) else plain)
        self.guided = guidance_scale != 1.0
        self._code = code_of(pipeline)
        for part in self._frozen_parts():
            part.requires_grad_(False).eval()

    def _frozen_parts(self) -> list[nn.Module]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name != self.component and isinstance(part, nn.Module)]

    @property
    def patch(self) -> int:
        """Side of a token, in pixels of the latent."""
        return self.config.get("patch_size") or 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights; training turns half precision into float32."""
        return getattr(self.pipeline, self.component).dtype

    def to(self, device: torch.device) -> None:
        for part in self._frozen_parts():
            part.to(device)

    def noise(self, conditions: Conditions, generator: Generators = None) -> Tensor:
        return gaussian_noise((len(conditions), *self.sample_shape), generator, self.device, torch.float32)

    def inputs(self, cond: dict[str, Tensor], guided: bool) -> dict[str, Tensor]:
        """Conditional inputs `(B, ...)` of the network; if `guided`, preceded by as many unconditional ones."""
        raise NotImplementedError

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity `(B, ...)` without guidance."""
        raise NotImplementedError

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Combines the two velocities, float32."""
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        inputs = self.inputs(cond, self.guided)
        if not self.guided:
            return self.predict(model, x, t, inputs).float()
        # one forward pass for both: distributed wrappers expect one per step
        unconditional, conditional = self.predict(model, torch.cat([x, x]), torch.cat([t, t]), inputs).chunk(2)
        return self.guide(conditional.float(), unconditional.float())

    def unguided_velocity(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor], dropped: Tensor
    ) -> Tensor:
        """Predicts like `velocity`, but without guidance, and without the condition where `dropped` `(B,)` is true."""
        inputs = self.inputs(cond, self.guided)
        if self.guided:  # the unconditional half comes first
            rows = torch.arange(len(x), device=x.device) + len(x) * ~dropped
            inputs = {name: value[rows] for name, value in inputs.items()}
        return self.predict(model, x, t, inputs).float()

    def decode(self, x: Tensor) -> Tensor:
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            x = vae.decode((x / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0]
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def save_pretrained(self, path: str | os.PathLike, model: nn.Module | None = None) -> None:
        trained = getattr(self.pipeline, self.component)
        try:
            setattr(self.pipeline, self.component, trained if model is None else model)
            self.pipeline.save_pretrained(path)
        finally:
            setattr(self.pipeline, self.component, trained)
        add_code(Path(path), *self._code)

    def save_adapter(self, path: str | os.PathLike, network: PeftModel) -> None:
        """Writes the adapter of `network` in peft's format, and in diffusers' if the pipeline loads adapters."""
        network.save_pretrained(path)
        if not diffusers_loads_adapter(self.pipeline, network):
            return
        layers, parts = {}, dict(network.named_modules())
        for name, value in get_peft_model_state_dict(network).items():
            layer, _, factor = name.partition(".lora_")
            scale = parts[layer].scaling["default"] if factor[:1] == "B" else 1  # other programs know no alpha
            layers[name.removeprefix("base_model.model.")] = value * scale
        self.pipeline.save_lora_weights(path, **{f"{self.component}_lora_layers": layers})

    def read_weights(self, path: str | os.PathLike) -> Mapping[str, Tensor]:
        return self._network_class.from_pretrained(path, subfolder=self.component).state_dict()


def diffusers_loads_adapter(pipeline: object, network: nn.Module) -> bool:
    """Whether a pipeline's `load_lora_weights` can load the adapter of a network: LoRA and nothing beside it."""
    config = network.peft_config["default"] if isinstance(network, PeftModel) else None
    if not isinstance(config, LoraConfig) or not hasattr(pipeline, "save_lora_weights"):
        return False
    return config.bias == "none" and not (config.modules_to_save or config.target_parameters)


def decode_slices(
    policy: DiffusionPolicy, x: Tensor, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decodes `batch_size` samples at a time: uint8 images `(b, C, H, W)`, and a mask `(b,)` of finite ones."""
    for part in x.split(batch_size or len(x)):
        images = policy.decode(part)
        finite = part.flatten(1).isfinite().all(dim=1) & images.flatten(1).isfinite().all(dim=1)
        yield to_uint8(images), finite


def decode_uint8(policy: DiffusionPolicy, x: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Decodes all samples: uint8 images `(B, C, H, W)` and the mask `(B,)` of finite ones; see [`decode_slices`]."""
    images, finite = zip(*decode_slices(policy, x, batch_size), strict=True)
    return torch.cat(images), torch.cat(finite)


def to_uint8(images: Tensor) -> Tensor:
    """Converts images in [0, 1] to uint8 in [0, 255], rounded as for image files."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
