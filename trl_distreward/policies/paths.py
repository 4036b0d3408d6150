# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Bases of policies by the network's own path: its noise levels as times, its output as a velocity."""

import copy
import inspect

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .base import PipelinePolicy


class DiscreteTimePolicy(PipelinePolicy):
    """
    Base class for networks trained on discrete steps of a variance-preserving process, `z = α x_0 + s ε`.

    On this path `x_t = z / (α + s)` at `t = s / (α + s)`, with `σ = s/α = t / (1-t)`. Every prediction type is then
    linear in sample and output, `v = a x + b output`, and DDIM's step is Euler's. Times between training steps use
    interpolated steps; times above the last use the last. There is no velocity at `t = 0`. The pipeline's scheduler
    gives the noise levels, the prediction type, and whether the predicted data is clipped: before the velocity is
    computed, like DDIM's `use_clipped_model_output`.
    """

    velocity_at_data = False

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0):
        super().__init__(pipeline, guidance_scale)
        scheduler = pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            found = f"{type(scheduler).__name__} has no noise levels of a variance-preserving process"
            raise ValueError(f"{found}: if the network predicts noise, set a scheduler such as DDIMScheduler.")
        # a scheduler that was built with `from_config` of another class also stores what only that class reads
        known = inspect.signature(type(scheduler).__init__).parameters
        config = {name: value for name, value in scheduler.config.items() if name in known}
        if config.get("thresholding"):
            raise ValueError("thresholding=True makes predictions that are no velocities: set thresholding=False.")
        self.prediction_type = config.get("prediction_type")
        known_types = ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in known_types:
            raise ValueError(f"prediction_type={self.prediction_type!r}: choose one of {', '.join(known_types)}.")
        self.clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
        # σ would be infinite for a last level without any signal
        alphas = scheduler.alphas_cumprod.double().clamp(min=2**-30)
        self.sigmas = ((1 - alphas) / alphas).sqrt()  # (T,), ascending
        self.largest_sigma = self.sigmas[-1].item()

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Calls the network on its own sample and step: `(B, C, ...)`; channels beyond those of `z` are dropped."""
        raise NotImplementedError

    def timestep(self, sigma: Tensor) -> Tensor:
        """Training steps `(B,)` at noise levels `(B,)`, interpolated linearly."""
        table = self.sigmas = self.sigmas.to(sigma.device)
        upper = torch.searchsorted(table, sigma).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        step = (upper - 1 + (sigma - low) / (high - low)).clamp(0, len(table) - 1)
        whole = step.round()  # float32 times are slightly off the training step they stand for
        return torch.where((step - whole).abs() < 0.01, whole, step).float()

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        t = t.double()
        sigma = (t / (1 - t)).clamp(max=self.largest_sigma)
        alpha = (1 + sigma.square()).rsqrt()
        s = sigma * alpha
        if self.prediction_type == "epsilon":  # x_0 = z/α - σ output
            a, b = (1 - sigma / t) / t, sigma / t
        elif self.prediction_type == "v_prediction":  # x_0 = α z - s output
            a, b = (1 - alpha * s / t) / t, s / t
        else:
            a, b = 1 / t, -1 / t
        scale, a, b = (c.float().view(-1, *[1] * (x.ndim - 1)) for c in (s / t, a, b))
        output = self.network(model, (scale * x).to(self.dtype), self.timestep(sigma), inputs)
        return a * x + b * output[:, : x.shape[1]].float()

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        v = super().velocity(model, x, t, cond)
        if self.clip is None:
            return v
        t = t.view(-1, *[1] * (x.ndim - 1))
        return (x - (x - t * v).clamp(-self.clip, self.clip)) / t

    def grid(self, num_steps: int) -> tuple[list[float], float]:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        if hasattr(scheduler, "sigmas"):
            sigmas = torch.as_tensor(scheduler.sigmas[:-1], dtype=torch.float64)
        else:
            sigmas = self.sigmas.cpu()[torch.as_tensor(scheduler.timesteps).long().cpu()]
        # schedulers with several evaluations a step, such as PNDM and Heun, list steps twice
        sigma = sigmas[sigmas > 0].unique().flip(0)
        start = float(scheduler.init_noise_sigma)
        first = sigma[0].item()
        # the scheduler's starting noise is z, or x_0 + σ ε if init_noise_sigma is not 1: scale either to x_t
        scale = (1 + first**2) ** 0.5 / (1 + first) if start == 1 else start / (1 + first)
        return [*(sigma / (1 + sigma)).tolist(), 0.0], scale


class FlowPolicy(PipelinePolicy):
    """Base class for the rectified-flow path; with `even_sigmas` the pipeline passes its scheduler even levels."""

    even_sigmas = True

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample, which a dynamic shift depends on."""
        return (self.sample_shape[-2] // self.patch) * (self.sample_shape[-1] // self.patch)

    def grid(self, num_steps: int) -> tuple[list[float], float]:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config, options = scheduler.config, {}
        if config.get("use_dynamic_shifting", False):
            # the shift grows linearly in the number of tokens (arXiv 2403.03206, Section 5.3.2)
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (self.sequence_length - config.base_image_seq_len)
        if self.even_sigmas and not config.get("use_flow_sigmas", False):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), **options)
        else:
            scheduler.set_timesteps(num_steps, **options)
        return [*scheduler.sigmas[:-1].double().tolist(), 0.0], 1.0
