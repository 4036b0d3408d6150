# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards of single images by preference models: CLIPScore, PickScore and HPSv2.

Trainers call each as `reward(images=…, prompts=…)`. It returns one score per image, with gradients to
floating-point images in [0, 255]. Arguments of the named rewards are those of [`~metrics.load_clip`].
"""

import os
from collections.abc import Sequence

from torch import Tensor, nn

from ..metrics.clip import CLIPEmbeddings, load_clip
from ..metrics.extractors import extract_features


class PromptScore(nn.Module):
    """`scale` times the cosine of an image and its prompt, with `prefix` before it; at least `at_least`."""

    def __init__(
        self,
        clip: CLIPEmbeddings,
        scale: float = 1.0,
        prefix: str = "",
        at_least: float | None = None,
        name: str = "prompt_score",
    ):
        super().__init__()
        self.clip, self.scale, self.prefix, self.at_least = clip, scale, prefix, at_least
        self.__name__ = name

    def forward(self, images: Tensor, prompts: Sequence[str], **kwargs: object) -> Tensor:
        """Scores `(B,)`, float32, of uint8 or float32 images `(B, C, H, W)` in [0, 255] and their B prompts."""
        embeddings = extract_features(self.clip, images, name=self.__name__, gradient=images.requires_grad)
        texts = self.clip.prompts([self.prefix + prompt for prompt in prompts])
        scores = self.scale * (embeddings * texts.to(embeddings.device)).sum(dim=1)
        return scores if self.at_least is None else scores.clamp(min=self.at_least)


def clip_score(source: str | os.PathLike = "openai/clip-vit-base-patch32", **kwargs: str) -> PromptScore:
    """CLIPScore (Hessel et al., arXiv 2104.08718, Eq. 1): 2.5 cos(image, "A photo depicts …"), at least 0."""
    return PromptScore(load_clip(source, **kwargs), 2.5, "A photo depicts ", at_least=0.0, name="clip_score")


def pick_score(source: str | os.PathLike = "yuvalkirstain/PickScore_v1", **kwargs: str) -> PromptScore:
    """PickScore (arXiv 2305.01569): the cosine times the learnt temperature, by default with its own tokenizer."""
    if source == "yuvalkirstain/PickScore_v1":
        kwargs = {"tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **kwargs}
    clip = load_clip(source, **kwargs)
    return PromptScore(clip, clip.model.logit_scale.exp().item(), name="pick_score")


def hps_score(source: str | os.PathLike, **kwargs: str) -> PromptScore:
    """HPSv2 (arXiv 2306.09341): the cosine by a [`~transformers.CLIPModel`]; convert the authors' open_clip file."""
    return PromptScore(load_clip(source, **kwargs), name="hps_score")
