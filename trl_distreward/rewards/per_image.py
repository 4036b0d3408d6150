# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards of single images by preference models: CLIPScore, PickScore, HPSv2 and aesthetic predictors.

Each is called as trainers call a reward, `reward(images=…, conditions=…)`, and returns one score per image, with
gradients to images that are floating-point in [0, 255].
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics.clip import CLIPEmbeddings, load_clip
from ..metrics.extractors import FeatureExtractor, extract_features, freeze, module_of
from ..metrics.weights import find_weights, read_tensors


class PromptScore(nn.Module):
    """
    How well an image answers its prompt: `scale` times the cosine between their embeddings.

    Args:
        clip ([`~metrics.CLIPEmbeddings`]): embeds both.
        scale (`float`, *optional*, defaults to 1.0): multiplies the cosine.
        prefix (`str`, *optional*, defaults to `""`): put before every prompt.
        at_least (`float`, *optional*): scores below this are raised to it; their images then get no gradient.
        name (`str`, *optional*, defaults to `"prompt_score"`): of the reward, in logs.
    """

    differentiable = True

    def __init__(
        self,
        clip: CLIPEmbeddings,
        scale: float = 1.0,
        prefix: str = "",
        at_least: float | None = None,
        name: str = "prompt_score",
    ):
        super().__init__()
        freeze(clip)
        self.clip, self.scale, self.prefix, self.at_least = clip, scale, prefix, at_least
        self.__name__ = name

    def forward(self, images: Tensor, conditions: Sequence[str], **kwargs: Any) -> Tensor:
        """Scores `(B,)`, float32, of uint8 or float32 images `(B, C, H, W)` in [0, 255] and their B prompts."""
        embeddings = extract_features(self.clip, images, name=self.__name__, gradient=images.requires_grad)
        prompts = self.clip.prompts([self.prefix + prompt for prompt in conditions])
        scores = self.scale * (embeddings * prompts.to(embeddings.device)).sum(dim=1)
        return scores if self.at_least is None else scores.clamp(min=self.at_least)


class HeadScore(nn.Module):
    """
    What a head reads from an image's features, whatever the prompt.

    Args:
        feature_extractor (`Callable`): images `(B, C, H, W)` to features `(B, d)`.
        head (`torch.nn.Module`): features `(B, d)` to scores `(B, 1)`.
        name (`str`, *optional*, defaults to `"head_score"`): of the reward, in logs.

    Raises:
        ValueError: the head gives something else than one score per image.
    """

    differentiable = True

    def __init__(self, feature_extractor: FeatureExtractor, head: nn.Module, name: str = "head_score"):
        super().__init__()
        self.extractor, self.head = freeze(feature_extractor), head.requires_grad_(False).eval()
        self.module = module_of(feature_extractor)
        self.__name__ = name

    def forward(self, images: Tensor, conditions: Any = None, **kwargs: Any) -> Tensor:
        """Scores `(B,)`, float32, of uint8 or float32 images `(B, C, H, W)` in [0, 255]."""
        features = extract_features(self.extractor, images, conditions, gradient=images.requires_grad)
        with torch.autocast(features.device.type, enabled=False):  # as the features are
            scores = self.head(features)
        if scores.shape != (len(images), 1):
            raise ValueError(
                f"the head of {self.__name__!r} gives {tuple(scores.shape)} for {len(images)} images: it must give "
                f"one score each, ({len(images)}, 1)."
            )
        return scores[:, 0]


def clip_score(source: str | os.PathLike = "openai/clip-vit-base-patch32", **kwargs: Any) -> PromptScore:
    """
    CLIPScore (Hessel et al., arXiv 2104.08718, Eq. 1): 2.5 times the cosine, at least 0, of the image and
    "A photo depicts" and its prompt.

    Args:
        source (`str` or path, *optional*): Hub id or folder of a CLIP model.
        kwargs: further arguments of [`~metrics.load_clip`].
    """
    return PromptScore(load_clip(source, **kwargs), 2.5, "A photo depicts ", at_least=0.0, name="clip_score")


def pick_score(source: str | os.PathLike = "yuvalkirstain/PickScore_v1", **kwargs: Any) -> PromptScore:
    """
    PickScore (Kirstain et al., arXiv 2305.01569): the cosine times the temperature that the model has learnt.

    Args:
        source (`str` or path, *optional*): Hub id or folder. That of the authors takes the tokenizer of
            `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, as their model card says; a folder is taken to have its own.
        kwargs: further arguments of [`~metrics.load_clip`].
    """
    if source == "yuvalkirstain/PickScore_v1":
        kwargs = {"tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **kwargs}
    clip = load_clip(source, **kwargs)
    return PromptScore(clip, clip.model.logit_scale.exp().item(), name="pick_score")


def hps_score(source: str | os.PathLike, **kwargs: Any) -> PromptScore:
    """
    Human Preference Score v2 (Wu et al., arXiv 2306.09341): the cosine of a CLIP that was fine-tuned on preferences.

    Args:
        source (`str` or path): Hub id or folder of its weights as a [`~transformers.CLIPModel`]; its authors publish
            them in open_clip's format, which must be converted first.
        kwargs: further arguments of [`~metrics.load_clip`].
    """
    return PromptScore(load_clip(source, **kwargs), name="hps_score")


def aesthetic_score(
    head: str | os.PathLike, source: str | os.PathLike = "openai/clip-vit-large-patch14", **kwargs: Any
) -> HeadScore:
    """
    An aesthetic predictor as LAION's: linear layers on CLIP's image embedding.

    Args:
        head (`str` or path): file of the layers, or one on the Hub, `"org/repo:file"`, see
            [`~rewards.per_image.load_linear_head`].
        source (`str` or path, *optional*): Hub id or folder of the CLIP model that the head was trained on.
        kwargs: further arguments of [`~metrics.load_clip`].

    Raises:
        ValueError: the head does not fit the embedding.
    """
    clip, layers = load_clip(source, **kwargs), load_linear_head(head)
    if layers[0].in_features != clip.dimension:
        raise ValueError(
            f"the head {head} reads {layers[0].in_features} numbers, the embedding of {source} has {clip.dimension}: "
            "give the model that it was trained on."
        )
    return HeadScore(clip, layers.to(clip.mean.device), name="aesthetic_score")


def load_linear_head(source: str | os.PathLike) -> nn.Sequential:
    """
    Linear layers one after the other, with nothing between them, from a state dict: all its weights in the order of
    the numbers in their names, each with its bias. The layers of LAION's predictors are such, dropout aside.

    Args:
        source (`str` or path): as [`~metrics.find_weights`] takes it.

    Raises:
        ValueError: the file holds something else, or layers that do not fit one another or do not end in one number.
    """
    path = find_weights(source)
    tensors = read_tensors(path)
    prefixes = sorted(
        (name.removesuffix("weight") for name in tensors if f".{name}".endswith(".weight")),
        key=lambda prefix: [int(part) for part in re.findall(r"\d+", prefix)],
    )
    known = {prefix + kind for prefix in prefixes for kind in ("weight", "bias")}
    shapes = [tuple(tensors[f"{prefix}weight"].shape) for prefix in prefixes]
    fits = all(len(shape) == 2 for shape in shapes) and all(
        later[1] == earlier[0] for earlier, later in zip(shapes, shapes[1:], strict=False)
    )
    if not prefixes or known != set(tensors) or not fits or shapes[-1][0] != 1:
        raise ValueError(
            f"{path} holds {sorted(tensors)[:6]} with weights {shapes}: a head is linear layers, each with a weight "
            "and a bias, each as wide as the one before it is long, the last of one number; build another with "
            "HeadScore."
        )
    layers = [nn.Linear(shape[1], shape[0]) for shape in shapes]
    for prefix, layer in zip(prefixes, layers, strict=True):
        layer.load_state_dict({kind: tensors[prefix + kind].float() for kind in ("weight", "bias")})
    return nn.Sequential(*layers).requires_grad_(False).eval()
