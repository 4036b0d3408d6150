# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Policies of text-to-image flow models: SD3, Sana, Flux, Qwen-Image, Z-Image, Lumina 2."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .paths import FlowPolicy
from .text_to_image import TextToImagePolicy, latent_moments


class TextFlowPolicy(TextToImagePolicy, FlowPolicy):
    """Base class for prompts on the rectified-flow path."""

    def call(self, model: nn.Module, x: Tensor, time: Tensor, inputs: dict[str, Tensor], **extra: object) -> Tensor:
        """Calls the network with what all families share, and with `extra` arguments."""
        embeds = inputs["prompt_embeds"]
        shared = {"hidden_states": x.to(self.dtype), "timestep": time, "encoder_hidden_states": embeds}
        return model(**shared, **extra, return_dict=False)[0]


class StableDiffusion3Policy(TextFlowPolicy):
    """Policy of a [`~diffusers.StableDiffusion3Pipeline`] 3 or 3.5."""

    embeddings = {"prompt_embeds": 0, "pooled": 2}
    null_embeddings = {"prompt_embeds": 1, "pooled": 3}
    even_sigmas = False

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        timestep = t * self.pipeline.scheduler.config.num_train_timesteps
        return self.call(model, x, timestep, inputs, pooled_projections=inputs["pooled"])


class SanaPolicy(TextFlowPolicy):
    """Policy of a [`~diffusers.SanaPipeline`]."""

    embeddings = {"prompt_embeds": 0, "mask": 1}
    null_embeddings = {"prompt_embeds": 2, "mask": 3}
    even_sigmas = False

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        timestep = t * self.pipeline.scheduler.config.num_train_timesteps * self.config.timestep_scale
        output = self.call(model, x, timestep, inputs, encoder_attention_mask=inputs["mask"])
        return output[:, : x.shape[1]]  # a learned variance is dropped


class PackedPolicy(TextFlowPolicy):
    """Base class for networks with packed tokens of 2x2 latent pixels, which may take guidance as an input."""

    patch = 2
    packed = True

    def __init__(self, pipeline: DiffusionPipeline, guidance_scale: float = 1.0, **kwargs: Any):
        super().__init__(pipeline, guidance_scale, **kwargs)
        self.distilled = bool(self.config.guidance_embeds)
        self.guided = self.guided and not self.distilled

    @property
    def native_size(self) -> int:
        return self.pipeline.default_sample_size

    def guidance(self, x: Tensor) -> Tensor | None:
        """Guidance input `(B,)` of a distilled network."""
        return torch.full((len(x),), self.guidance_scale, device=x.device) if self.distilled else None

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Packs `(B, C, 2 h, 2 w)` into tokens `(B, h w, 4 C)`."""
        return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor) -> Tensor:
        height, width = self.sample_shape[-2:]
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


class FluxPolicy(PackedPolicy):
    """Policy of a [`~diffusers.FluxPipeline`]. A distilled network takes `guidance_scale` as an input."""

    embeddings = {"prompt_embeds": 0, "pooled": 1}
    null_embeddings = None

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        height, width = self.sample_shape[-2] // 2, self.sample_shape[-1] // 2
        places = torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in (1, height, width)))
        embeds = inputs["prompt_embeds"]
        ids = {"txt_ids": embeds.new_zeros(embeds.shape[1], 3), "img_ids": places.to(self.dtype)}
        pooled, guidance = inputs["pooled"], self.guidance(x)
        tokens = self.call(model, self.pack(x), t, inputs, guidance=guidance, pooled_projections=pooled, **ids)
        return self.unpack(tokens)


class QwenImagePolicy(PackedPolicy):
    """Policy of a [`~diffusers.QwenImagePipeline`]: a guided token is rescaled to the conditional one's norm."""

    null_embeddings = None
    null_prompt = " "

    def embed(self, prompt: str | None) -> dict[str, Tensor]:
        (row,), mask = self.encode_prompt(self.null_prompt if prompt is None else prompt)
        row = (row if mask is None else row[mask[0].bool()]).cpu()
        return {"prompt_embeds": row, "mask": torch.ones(len(row), dtype=torch.long)}

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
        extra = {"encoder_hidden_states_mask": inputs["mask"], "img_shapes": shapes}
        return self.unpack(self.call(model, self.pack(x), t, inputs, guidance=self.guidance(x), **extra))

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        tokens, guided = self.pack(conditional), self.pack(super().guide(conditional, unconditional))
        return self.unpack(guided * (tokens.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)))

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = latent_moments(vae.config, x)
        frames = vae.decode((x * std + mean).to(vae.dtype)[:, :, None], return_dict=False)[0]
        return (frames[:, :, 0].float() / 2 + 0.5).clamp(0, 1)


class ZImagePolicy(TextFlowPolicy):
    """Policy of a [`~diffusers.ZImagePipeline`], whose own `guidance_scale` is lower by one: here 1.0 is none."""

    patch = 2
    _counted: tuple[Tensor | None, list[int]] = (None, [])  # a batch's mask and its prompts' lengths

    @property
    def native_size(self) -> int:
        return 1024 // self.pipeline.vae_scale_factor

    def embed(self, prompt: str | None) -> dict[str, Tensor]:
        row = super().embed(prompt)
        return row | {"mask": torch.ones(len(row["prompt_embeds"]))}

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if inputs["mask"] is not self._counted[0]:  # read from the device once for all steps
            self._counted = inputs["mask"], inputs["mask"].bool().sum(dim=1).tolist()
        texts = [row[:length] for row, length in zip(inputs["prompt_embeds"], self._counted[1], strict=True)]
        images = list(x.to(self.dtype).unsqueeze(2).unbind(0))  # (C, 1, H, W) each
        return -torch.stack(model(images, 1 - t, texts, return_dict=False)[0]).squeeze(2)


class Lumina2Policy(TextFlowPolicy):
    """Policy of a [`~diffusers.Lumina2Pipeline`]. Each row of a guided velocity keeps the conditional one's norm."""

    embeddings = {"prompt_embeds": 0, "mask": 1}
    null_embeddings = {"prompt_embeds": 2, "mask": 3}

    @property
    def sequence_length(self) -> int:
        return self.sample_shape[0]  # the pipeline itself counts channels here

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return -self.call(model, x, 1 - t, inputs, encoder_attention_mask=inputs["mask"])

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        guided = super().guide(conditional, unconditional)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
