# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Where a network's own noise levels lie on the rectified-flow path, and what velocity its output is there."""

import copy
import inspect
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from .base import PipelinePolicy


def _used(scheduler: Any) -> FrozenDict:
    """What of its configuration a scheduler uses: made from another's, it keeps what only that one knew."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return FrozenDict({name: value for name, value in scheduler.config.items() if name in known})


class DiscreteTimePolicy(PipelinePolicy):
    """
    Base of policies whose network knows discrete steps of a variance-preserving process, `z = α x_0 + s ε`.

    `z` is on the path as `x_t = z / (α + s)` at `t = s / (α + s)`, where `σ = s/α = t / (1-t)`. Every prediction type
    is then linear in sample and output, `v = a x + b output`, and DDIM's step is Euler's. Between steps of training
    the network is asked at interpolated ones; between the last of them and `t = 1`, at the last.

    At `t = 0`, where what the network predicts is no velocity yet, there is none.

    The pipeline's scheduler gives the noise levels, the prediction type, and whether predicted data is clipped. It is
    clipped before the velocity is taken, DDIM's `use_clipped_model_output`: only that is a velocity.
    """

    velocity_at_data = False

    def __init__(self, pipeline: Any, guidance_scale: float = 1.0):
        super().__init__(pipeline, guidance_scale)
        config = _used(pipeline.scheduler)
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(pipeline).__name__} with a {type(pipeline.scheduler).__name__} is not of a "
                "variance-preserving process, which is all that this policy knows: set a scheduler such as "
                "DDIMScheduler if the network predicts noise; of a SiT exported to DiTPipeline, train the SiTPipeline."
            )
        if config.get("thresholding", False):
            raise ValueError("dynamic thresholding of the scheduler is no velocity: set thresholding=False.")
        self.prediction_type = config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"prediction_type={self.prediction_type!r} of the scheduler is none of a variance-preserving process: "
                "'epsilon', 'v_prediction' or 'sample'."
            )
        self.clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None
        # a last level without any signal would be t = 1, where σ is infinite
        alphas = pipeline.scheduler.alphas_cumprod.double().clamp(min=2**-30)
        self.sigmas = ((1 - alphas) / alphas).sqrt()  # (T,), ascending
        self.largest_sigma = self.sigmas[-1].item()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.sigmas = self.sigmas.to(device)

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The network's output `(B, C, ...)` at its own sample and step; channels beyond those of `z` are dropped."""
        raise NotImplementedError

    def timestep(self, sigma: Tensor) -> Tensor:
        """Steps `(B,)` of noise levels `(B,)`, interpolated linearly."""
        table = self.sigmas.to(sigma.device)  # where the policy is used without a trainer
        upper = torch.searchsorted(table, sigma).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        step = (upper - 1 + (sigma - low) / (high - low)).clamp(0, len(table) - 1)
        whole = step.round()  # float32 times are a little off the steps of training that they mean
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
        # schedulers of several evaluations a step, such as PNDM and Heun, list steps twice
        sigma = sigmas[sigmas > 0].unique().flip(0)
        start = float(scheduler.init_noise_sigma)
        first = sigma[0].item()
        # noise stands for z, or, `start` times, for x_0 + σ ε: of either, x is (1 + σ)-th, times sqrt(1 + σ²) for z
        scale = (1 + first**2) ** 0.5 / (1 + first) if start == 1 else start / (1 + first)
        return [*(sigma / (1 + sigma)).tolist(), 0.0], scale


class FlowPolicy(PipelinePolicy):
    """
    Base of policies whose network knows the path as it is; `grid` follows the scheduler, its shifts included.

    `even_sigmas` tells whether the pipeline hands its scheduler even noise levels from 1 to `1/num_steps`, or leaves
    them to it; `sequence_length` is what the shift depends on where it is dynamic.
    """

    even_sigmas = True

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample, of two by two pixels of the latent."""
        return (self.sample_shape[-2] // 2) * (self.sample_shape[-1] // 2)

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
