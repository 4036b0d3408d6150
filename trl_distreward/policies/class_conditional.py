# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Policies of class-conditional and unconditional pipelines."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..sampling import karras_grid, send
from .base import PipelinePolicy
from .paths import DiscreteTimePolicy


class ClassLabelPolicy(PipelinePolicy):
    """Base class for integer labels as conditions; guidance leads away from the label `null_class`."""

    num_conditions: int
    null_class: int | None = None

    def check_conditions(self, conditions: Tensor | Sequence[int]) -> None:
        labels, count = torch.as_tensor(conditions), self.num_conditions
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels of shape {tuple(labels.shape)} and {labels.dtype}: pass a list of integers.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < count):
            span = f"{labels.min().item()} to {labels.max().item()}"
            raise ValueError(f"class labels span {span}: this model's labels must lie in 0 to {count - 1}.")

    def encode(self, conditions: Tensor | Sequence[int]) -> dict[str, Tensor]:
        labels = torch.as_tensor(conditions)
        if labels.device.type == "cpu":  # on a GPU the check would wait for the device
            self.check_conditions(labels)
        return {"class_labels": send(labels, self.device).long()}

    def inputs(self, cond: dict[str, Tensor], guided: bool) -> dict[str, Tensor]:
        labels = cond["class_labels"]
        if not guided:
            return {"class_labels": labels}
        return {"class_labels": torch.cat([torch.full_like(labels, self.null_class or 0), labels])}


class ClassConditionalPolicy(ClassLabelPolicy):
    """Policy of a [`SiTPipeline`]; `guidance_channels` guides only the first channels, in SiT's code 3 of 4."""

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0, guidance_channels: int | None = None):
        pipeline.check_guidance(guidance_scale)
        super().__init__(pipeline, guidance_scale)
        channels = self.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels={guidance_channels} must lie in 1 to {channels}, as the model has.")
        self.guidance_channels = guidance_channels
        self.num_conditions = max(self.config.num_classes, 1)  # an unconditional model has one class
        # a network of its own guides without a null class
        self.null_class = self.num_conditions if self.guided and not hasattr(pipeline, "guider") else None
        self.sample_shape = (channels, self.config.sample_size, self.config.sample_size)

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        options = {} if self.guidance_channels is None else {"guidance_channels": self.guidance_channels}
        labels = cond["class_labels"]
        return self.pipeline.predict_velocity(model, x, t, labels, self.guidance_scale, **options).float()

    def unguided_velocity(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor], dropped: Tensor
    ) -> Tensor:
        labels = cond["class_labels"]
        if self.null_class is not None:
            labels = torch.where(dropped, self.null_class, labels)
        return self.pipeline.predict_velocity(model, x, t, labels).float()

    def decode(self, x: Tensor) -> Tensor:
        return self.pipeline.decode(x)


class EDM2Policy(ClassConditionalPolicy):
    """Policy of an [`EDM2Pipeline`]; its guiding network is frozen."""

    component = "unet"
    velocity_at_data = False  # the denoiser takes log σ
    solver = "heun_sigma"  # on its own grid

    def grid(self, num_steps: int) -> tuple[list[float], float]:
        times = karras_grid(num_steps)
        return times, times[0]


class DiTPolicy(ClassLabelPolicy, DiscreteTimePolicy):
    """Policy of a [`~diffusers.DiTPipeline`]: noise prediction; a learned variance is dropped."""

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0):
        super().__init__(pipeline, guidance_scale)
        self.num_conditions = self.config.num_embeds_ada_norm
        self.null_class = self.num_conditions  # DiTPipeline uses 1000, whatever the number of classes
        names: dict[str, list[str]] = {}
        for name, label in pipeline.labels.items():
            names.setdefault(str(label), []).append(name)
        if names:  # DiTPipeline reads them from its config but does not save them
            pipeline.register_to_config(id2label={label: ", ".join(names[label]) for label in names})
        self.sample_shape = (self.config.in_channels, self.config.sample_size, self.config.sample_size)

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return model(z, timestep=timestep, class_labels=inputs["class_labels"], return_dict=False)[0]


class UNetPolicy(ClassLabelPolicy, DiscreteTimePolicy):
    """Policy of a [`~diffusers.UNet2DModel`], in pixels or a VQ-VAE's latents; `null_class` stands for "no class"."""

    component = "unet"

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0, null_class: int | None = None):
        super().__init__(pipeline, guidance_scale)
        classes = self.config.num_class_embeds
        if null_class is not None and (classes is None or null_class != classes - 1):
            raise ValueError(f"null_class={null_class} must be the last of num_class_embeds={classes} labels.")
        self.has_classes, self.null_class = classes is not None, null_class
        self.num_conditions = (classes or 1) if null_class is None else null_class
        if self.guided and null_class is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a null class: pass null_class, or set 1.0.")
        size = self.config.sample_size
        self.sample_shape = (self.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["class_labels"] if self.has_classes else None
        return model(z, timestep, class_labels=labels, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        codes = getattr(self.pipeline, "vqvae", None)
        if codes is not None:
            x = codes.decode((x / codes.config.scaling_factor).to(codes.dtype), return_dict=False)[0]
        return super().decode(x)
