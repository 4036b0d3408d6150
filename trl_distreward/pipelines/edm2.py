# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Image generation with EDM2 (arXiv 2312.02696): in latent space, or in pixel space without a VAE."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

# mean and standard deviation of each latent channel of stabilityai/sd-vae-ft-mse, for images in [0, 1]; the networks
# were trained on latents with mean 0 and standard deviation 0.5
_RAW_MEAN, _RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
LATENTS_SCALE = [0.5 / std for std in _RAW_STD]
LATENTS_BIAS = [-0.5 * mean / std for mean, std in zip(_RAW_MEAN, _RAW_STD, strict=True)]
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


class EDM2Pipeline(DiffusionPipeline):
    """
    Pipeline for image generation with an EDM2 network.

    Parameters:
        unet ([`EDM2UNet2DModel`]): denoiser.
        guider ([`EDM2UNet2DModel`], *optional*):
            a worse network that guidance moves away from: unconditional, smaller or less trained (autoguidance,
            arXiv 2406.02507).
        vae ([`~diffusers.AutoencoderKL`], *optional*): decodes latents; without it samples are images in [-1, 1].
        latents_scale, latents_bias (`list[float]`, *optional*):
            per channel, `latents = raw · scale + bias` with the VAE's own latents `raw`; by default as in EDM2 with
            `stabilityai/sd-vae-ft-mse`.
    """

    model_cpu_offload_seq = "guider->unet->vae"
    _optional_components = ["guider", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        guider: ModelMixin | None = None,
        vae: AutoencoderKL | None = None,
        latents_scale: list[float] = LATENTS_SCALE,
        latents_bias: list[float] = LATENTS_BIAS,
    ):
        super().__init__()
        self.register_modules(unet=unet, guider=guider, vae=vae)
        self.register_to_config(latents_scale=list(latents_scale), latents_bias=list(latents_bias))
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: object) -> DiffusionPipeline:
        """Shares the networks too: diffusers' own method asks for the exact class that the constructor names."""
        return super().from_pipe(pipeline, **{"unet": pipeline.unet, "guider": pipeline.guider, **kwargs})

    def denoise(
        self, model: nn.Module, z: Tensor, sigma: Tensor, class_labels: Tensor, guidance_scale: float = 1.0
    ) -> Tensor:
        """Denoises `z = x_0 + σ ε` `(B, C, H, W)` at noise levels `(B,)`, guided away from the guider's result."""
        denoised = model(z, sigma, class_labels if self.unet.config.num_classes else None, return_dict=False)[0]
        if guidance_scale == 1.0:
            return denoised
        with torch.no_grad():
            labels = class_labels if self.guider.config.num_classes else None
            worse = self.guider(z, sigma, labels, return_dict=False)[0]
        return worse + guidance_scale * (denoised - worse)

    def predict_velocity(
        self, model: nn.Module, x: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: float = 1.0
    ) -> Tensor:
        """
        Predicts the velocity `x_noise - x_data = (x - denoised) / t` at `x = (1-t) x_data + t x_noise`, `t` in (0, 1].

        The network sees `x (1+σ)` at `σ = t/(1-t)`, or at 80 for all higher levels. Other arguments as in `denoise`.
        """
        sigma = (t / (1 - t)).clamp(max=SIGMA_MAX)
        shape = (-1,) + (1,) * (x.ndim - 1)
        denoised = self.denoise(model, x * (sigma / t).view(shape), sigma, class_labels, guidance_scale)
        return (x - denoised) / t.view(shape)

    def decode(self, x: Tensor) -> Tensor:
        """Decodes samples `(B, C, H, W)` to images `(B, channels, height, width)` in [0, 1], with gradients."""
        if self.vae is None:
            return (x.float() / 2 + 0.5).clamp(0, 1)
        values = (self.config.latents_scale, self.config.latents_bias)
        scale, bias = (torch.tensor(value, device=x.device).view(1, -1, 1, 1) for value in values)
        raw = (x.float() - bias) / scale
        return self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float().clamp(0, 1)

    def check_guidance(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and self.guider is None:
            raise ValueError(f"guidance_scale={guidance_scale} but there is no guider: load it with guider=...")

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 32,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Generates images by Heun's method on EDM's noise levels, without churn (arXiv 2206.00364, Algorithm 1, Eq. 5).

        The noise levels go from 80 to 0.002, evenly in `σ^(1/7)`; each step takes two evaluations but the last.
        Labels lie in 0 to `num_classes - 1`, zeros without classes. A `guidance_scale` of 1.0 is no guidance. Other
        arguments and the result are as in [`SiTPipeline`]; a callback gets a noise level as `t`.

        Example:
            >>> from trl_distreward import EDM2Pipeline, EDM2UNet2DModel
            >>> unet = EDM2UNet2DModel(32, in_channels=3, model_channels=64, num_blocks=1)  # with random weights
            >>> EDM2Pipeline(unet)([207, 360], num_inference_steps=4).images[0].size
            (32, 32)
        """
        device, config = self._execution_device, self.unet.config
        labels = torch.as_tensor(class_labels, device=device).reshape(-1).repeat_interleave(num_images_per_prompt)
        self.check_guidance(guidance_scale)
        classes = max(config.num_classes, 1)
        if any(not 0 <= label < classes for label in labels.tolist()):
            raise ValueError(f"class_labels={labels.tolist()} must be a list of integers from 0 to {classes - 1}.")
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 2.")
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} images: give one of each per image.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but these labels and model need {shape}.")
        first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        sigmas = [(first + i / (num_inference_steps - 1) * (last - first)) ** RHO for i in range(num_inference_steps)]

        def slope(z: Tensor, sigma: float) -> Tensor:
            levels = torch.full((len(labels),), sigma, device=device)
            return (z - self.denoise(self.unet, z, levels, labels, self.guidance_scale)) / sigma

        z = latents.to(device, torch.float32) * sigmas[0]
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale, False, num_inference_steps
        for i, (sigma, following) in enumerate(self.progress_bar(list(pairwise([*sigmas, 0.0])))):
            if self._interrupt:
                continue
            direction = slope(z, sigma)
            if following > 0:
                euler = z + (following - sigma) * direction
                direction = 0.5 * (direction + slope(euler, following))
            z = z + (following - sigma) * direction
            if callback_on_step_end is not None:
                tensors = {name: {"latents": z}[name] for name in callback_on_step_end_tensor_inputs}
                z = callback_on_step_end(self, i, sigma, tensors).get("latents", z)

        images = z if output_type == "latent" else self.decode(z)
        if output_type not in ("latent", "pt"):
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=[False] * len(z))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
