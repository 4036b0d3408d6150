# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Policies of text-to-image pipelines with discrete time steps: Stable Diffusion 1 and 2, SDXL, PixArt-Σ."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .paths import DiscreteTimePolicy
from .text_to_image import TextToImagePolicy, latent_moments


class StableDiffusionPolicy(TextToImagePolicy, DiscreteTimePolicy):
    """Policy of a [`~diffusers.StableDiffusionPipeline`] 1.x or 2.x; its safety checker is not used."""

    component = "unet"

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0, **kwargs: Any):
        super().__init__(pipeline, guidance_scale, **kwargs)
        if self.config.get("time_cond_proj_dim") is not None:
            given = f"time_cond_proj_dim={self.config.time_cond_proj_dim}, as of a latent consistency model"
            raise ValueError(f"{given}, takes guidance as an embedding: train the model that it was distilled from.")

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return model(z, timestep, encoder_hidden_states=inputs["prompt_embeds"], return_dict=False)[0]


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """Policy of a [`~diffusers.StableDiffusionXLPipeline`], at its full size without crops."""

    embeddings = {"prompt_embeds": 0, "pooled": 2}
    null_embeddings = {"prompt_embeds": 1, "pooled": 3}

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        # original size, corner of the crop, target size (arXiv 2307.01952, Section 2.2)
        sizes = [z.new_full((len(z), 1), side) for side in (*self.size, 0, 0, *self.size)]
        added = {"text_embeds": inputs["pooled"], "time_ids": torch.cat(sizes, dim=1)}
        embeds = inputs["prompt_embeds"]
        return model(z, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = latent_moments(config, x)
            x = x * std + mean * config.scaling_factor
        return super().decode(x)


class PixArtSigmaPolicy(TextToImagePolicy, DiscreteTimePolicy):
    """Policy of a [`~diffusers.PixArtSigmaPipeline`]; a learned variance is dropped."""

    embeddings = {"prompt_embeds": 0, "mask": 1}
    null_embeddings = {"prompt_embeds": 2, "mask": 3}

    def network(self, model: nn.Module, z: Tensor, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}  # only PixArt-α has them
        texts = {"encoder_hidden_states": inputs["prompt_embeds"], "encoder_attention_mask": inputs["mask"]}
        return model(z, timestep=timestep, added_cond_kwargs=sizes, return_dict=False, **texts)[0]
