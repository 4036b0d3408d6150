# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Base class for prompts: how they become tensors, and when they are embedded."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from inspect import signature

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .base import PipelinePolicy

# Longest prompt in UTF-8. Text encoders read a few hundred tokens.
MAX_BYTES = 4096


class TextToImagePolicy(PipelinePolicy):
    """
    Base class for prompts as conditions. A family names the outputs of its pipeline's `encode_prompt` in `embeddings`
    and `null_embeddings`.

    An encoded prompt is its text, as embeddings would take megabytes per image. Those of `cache_size` prompts are kept
    in CPU memory, and padded with zeros at the end. `offload_text_encoders` keeps the encoders there while they do not
    encode. `height` and `width` are the image's in pixels; the network's native size by default.
    """

    embeddings: dict[str, int] = {"prompt_embeds": 0}
    null_embeddings: dict[str, int] | None = {"prompt_embeds": 1}
    null_prompt = ""  # used if `encode_prompt` returns no null embeddings
    packed = False  # whether the network's channels are those of 2x2 pixels of the latent

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        cache_size: int = 10000,
        offload_text_encoders: bool = False,
    ):
        super().__init__(pipeline, guidance_scale)
        factor, native = pipeline.vae_scale_factor, self.native_size
        rows, columns = (native, native) if isinstance(native, int) else native
        self.size = (rows * factor if height is None else height, columns * factor if width is None else width)
        if any(side < 1 or side % (factor * self.patch) for side in self.size):
            raise ValueError(f"height and width, {self.size}, must be multiples of {factor * self.patch}.")
        channels = self.config.in_channels // (4 if self.packed else 1)
        self.sample_shape = (channels, *(side // factor for side in self.size))
        self.offload_text_encoders = offload_text_encoders
        self._embedding = lru_cache(cache_size)(self._compute_embedding)
        # the last batch's embeddings on the device: all steps of a rollout use the same batch
        self._last: tuple[tuple | None, dict[str, Tensor]] = (None, {})
        # the last encoded batch and its prompts: reading prompts from the device would wait for its queue
        self._read: tuple[Tensor | None, list[str]] = (None, [])
        vae = pipeline.vae
        if vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
            vae.float()  # float16 overflows

    @property
    def native_size(self) -> int | tuple[int, int]:
        """Native height and width of the latent, or one number for both."""
        return self.config.sample_size

    def _text_encoders(self) -> list[nn.Module]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> None:
        # not the safety checker, for example: nothing here uses it
        for part in [self.pipeline.vae, *([] if self.offload_text_encoders else self._text_encoders())]:
            if part is not None:
                part.to(device)

    def check_conditions(self, conditions: Sequence[str]) -> None:
        if isinstance(conditions, str):
            raise ValueError(f"{conditions!r} is one prompt: pass a list of them.")
        for prompt in conditions:
            if not isinstance(prompt, str):
                raise ValueError(f"{prompt!r} is not a prompt: pass a list of strings.")
            if len(prompt.encode()) > MAX_BYTES or "\0" in prompt:
                raise ValueError(f"prompt {prompt[:40]!r}… needs at most {MAX_BYTES} UTF-8 bytes, none of them zero.")

    def encode(self, conditions: Sequence[str]) -> dict[str, Tensor]:
        self.check_conditions(conditions)
        padded = b"".join(prompt.encode().ljust(MAX_BYTES, b"\0") for prompt in conditions)
        texts = torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(-1, MAX_BYTES)
        self._read = texts.to(self.device), list(conditions)
        return {"prompt": self._read[0]}

    def prompts(self, encoded: Tensor) -> list[str]:
        """Reads back the prompts that `encode` stored in a tensor, from the device only once per tensor."""
        if encoded is not self._read[0]:
            self._read = encoded, [row.tobytes().rstrip(b"\0").decode() for row in encoded.cpu().numpy()]
        return self._read[1]

    def inputs(self, cond: dict[str, Tensor], guided: bool) -> dict[str, Tensor]:
        prompts = self.prompts(cond["prompt"])
        return self.embedded([*[None] * len(prompts), *prompts] if guided else prompts)

    def embedded(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """Embeddings `(B, ...)` by name, on the network's device; `None` is the null prompt."""
        key = (self.device, self.dtype, *prompts)
        if key == self._last[0]:
            return self._last[1]
        rows = [self._embedding(prompt) for prompt in prompts]
        if self.offload_text_encoders:
            for encoder in self._text_encoders():
                encoder.to("cpu")
        batch = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
        for name, value in batch.items():
            batch[name] = value.to(self.device, self.dtype if value.is_floating_point() else None)
        self._last = (key, batch)
        return batch

    @torch.no_grad()
    def _compute_embedding(self, prompt: str | None) -> dict[str, Tensor]:
        if self.offload_text_encoders:
            for encoder in self._text_encoders():
                encoder.to(self.device)
        # the network's autocast does not apply to text encoders
        with torch.autocast(self.device.type, enabled=False):
            return self.embed(prompt)

    def embed(self, prompt: str | None) -> dict[str, Tensor]:
        """Embeds one prompt, or with `None` the null prompt; in batches, the last bits would change."""
        if prompt is None and self.null_embeddings is not None:
            returned, places = self.encode_prompt("", do_classifier_free_guidance=True), self.null_embeddings
        else:
            text = self.null_prompt if prompt is None else prompt
            returned, places = self.encode_prompt(text, do_classifier_free_guidance=False), self.embeddings
        return {name: returned[at][0].cpu() for name, at in places.items()}

    def encode_prompt(self, prompt: str, **options: object) -> tuple:
        """Calls the pipeline's `encode_prompt` with the arguments that the pipeline itself uses."""
        called = signature(type(self.pipeline).__call__).parameters
        known = signature(self.pipeline.encode_prompt).parameters
        shared = ("max_sequence_length", "clean_caption", "complex_human_instruction")
        options |= {name: called[name].default for name in shared if name in called}
        options |= {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "device": self.device}
        options = {name: value for name, value in options.items() if name in known}
        return self.pipeline.encode_prompt(prompt=[prompt], **options)


def latent_moments(config: Mapping[str, Sequence[float]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of a VAE's latents, to broadcast with `x` `(B, C, H, W)`."""
    mean, std = (torch.tensor(config[name], device=x.device) for name in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
