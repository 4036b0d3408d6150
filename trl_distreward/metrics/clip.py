# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""CLIP embeddings of images and prompts, and features of images joined with their prompts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditions import Conditions
from .backbones import CLIP_MEAN, CLIP_STD, BackboneFeatures
from .extractors import FeatureExtractor, Joint, freeze, module_of
from .precision import full_precision

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

TEXT_BATCH = 64  # prompts that go through the text encoder at a time


class CLIPEmbeddings(BackboneFeatures):
    """Normalized embeddings of images (by a call) and of `prompts` by a [`~transformers.CLIPModel`], in float32."""

    cache_size = 10_000  # prompts whose embeddings are kept, in CPU memory
    model: "CLIPModel"

    def __init__(
        self, model: "CLIPModel", tokenizer: "PreTrainedTokenizerBase", name: str = "clip", resize: str = "pillow"
    ):
        size = model.config.vision_config.image_size
        super().__init__(model, name, "image_embeds", size, CLIP_MEAN, CLIP_STD, resize)
        self.tokenizer = tokenizer
        self.max_length = model.config.text_config.max_position_embeddings
        self._cache: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        with full_precision():
            outputs = self.model.get_image_features(pixel_values=self.prepare(images))
            return F.normalize(outputs.pooler_output, dim=1).float()

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `(B, d)` of prompts, on the model's device."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(missing), TEXT_BATCH):
            part = missing[start : start + TEXT_BATCH]
            # always as many, and the full length: a prompt's last bits must not depend on which others are embedded
            filled = part + [""] * (TEXT_BATCH - len(part))
            size = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
            tokens = self.tokenizer(filled, return_tensors="pt", **size).to(self.mean.device)
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            with full_precision():
                outputs = self.model.get_text_features(**inputs)
                embeddings = F.normalize(outputs.pooler_output, dim=1).float()
            self._cache.update(zip(part, embeddings.cpu().unbind()[: len(part)], strict=True))
        embeddings = torch.stack([self._cache[prompt] for prompt in prompts])
        if len(self._cache) > self.cache_size:
            self._cache = {prompt: self._cache[prompt] for prompt in prompts}
        return embeddings.to(self.mean.device)


class JointTextFeatures(Joint, nn.Module):
    """Features of an image joined with its prompt's by `text_encoder`, times `scale`; see [`JointFeatures`]."""

    def __init__(
        self,
        feature_extractor: FeatureExtractor,
        text_encoder: Callable[[Sequence[str]], Tensor],
        scale: float | None = None,
    ):
        super().__init__()
        self.extractor = freeze(feature_extractor)
        self.text_encoder = freeze(text_encoder)
        # registered here, because the module behind a method or a wrapper would not be moved otherwise
        self.image_module, self.text_module = module_of(feature_extractor), module_of(text_encoder)
        self.scale, self.image_name = scale, getattr(feature_extractor, "name", "features")
        self.resize = str(getattr(feature_extractor, "resize", self.image_name))

    @property
    def name(self) -> str:
        return f"{self.image_name}+text-{self.scale:g}"

    def embed(self, conditions: Conditions, like: Tensor) -> Tensor:
        return self.text_encoder(conditions).to(like)


def load_clip(
    source: str | os.PathLike, *, tokenizer: str | None = None, revision: str | None = None, resize: str = "pillow"
) -> CLIPEmbeddings:
    """Loads a [`~transformers.CLIPModel`] by Hub id or folder, with the `tokenizer` of another if it has none."""
    from transformers import AutoTokenizer, CLIPModel

    source, text = str(source), tokenizer or str(source)
    at = {} if revision is None else {"revision": revision}
    model, report = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **at)
    tokens = AutoTokenizer.from_pretrained(text, **(at if text == source else {}))
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks weights of CLIP, which would be random: {[*report['missing_keys']][:4]}.")
    return CLIPEmbeddings(model, tokens, Path(source).name if os.path.isdir(source) else source, resize)
