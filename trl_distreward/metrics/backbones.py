# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Vision backbones of transformers as feature extractors."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import State
from .precision import full_precision
from .preprocessing import resize_pillow, to_rgb

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESIZES: dict[str, Callable[..., Tensor]] = {
    "torch": partial(F.interpolate, antialias=True, align_corners=False),
    "pillow": resize_pillow,
}
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as in preprocessor configurations
# the vector that stands for the image, and the families that use it; others need `pooling`
POOLINGS = {
    "cls": ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit"),
    "pooler": ("convnext", "convnextv2", "resnet", "swin", "swinv2"),
    "mean": ("ijepa",),
    "image_embeds": ("clip",),
}
# Named backbones: where their weights are, and the settings of their metrics' references
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": (
        "facebook/dinov2-large",
        {"pooling": "cls", "size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "torch"},
    ),
    "clip": (
        "openai/clip-vit-large-patch14-336",
        {"pooling": "image_embeds", "size": 336, "mean": CLIP_MEAN, "std": CLIP_STD, "resize": "pillow"},
    ),
}
OPTIONS = ("pooling", "size", "mean", "std", "mode", "revision")


class BackboneFeatures(nn.Module):
    """
    Features of a vision backbone of transformers, computed in float32 without autocast or TF32.

    Args:
        model (`torch.nn.Module`): called with `pixel_values`, returns one of transformers' outputs.
        name (`str`): name of these features in metadata.
        pooling (`str`): `"cls"`, the first token after the final normalization; `"mean"`, over all tokens or
            positions; `"pooler"`, the model's `pooler_output`; `"image_embeds"`, CLIP's projection, of length 1.
        size (`int`): side of the network's input; the whole image is resized to it, nothing is cropped.
        mean, std (`tuple[float]` of length 3): normalization of each colour, for values in [0, 1].
        resize (`str`, *optional*, defaults to `"torch"`): `"torch"`, unrounded; or `"pillow"`, Pillow's to the bit.
        mode (`str`, *optional*, defaults to `"bicubic"`): or `"bilinear"`.

    The attribute `resize` names every step that is not in the weights: `"torch-bicubic-224"`, and pooling and
    normalization if they are unusual, as in `"pillow-bicubic-336-image_embeds-clip"`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pooling: str,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: str = "torch",
        mode: str = "bicubic",
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown: choose one of {', '.join(map(repr, POOLINGS))}.")
        if resize not in RESIZES or mode not in RESAMPLING.values():
            raise ValueError(f"resize={resize!r}, mode={mode!r}: choose 'torch' or 'pillow', 'bicubic' or 'bilinear'.")
        self.model, self.pooling, self.size, self.mode = model, pooling, size, mode
        unusual = _normalization(mean, std) if pooling == "cls" else [pooling, *_normalization(mean, std)]
        self.name, self.resize = name, "-".join([resize, mode, str(size), *unusual])
        self._resize = RESIZES[resize]
        device = next(model.parameters()).device
        for buffer, values in (("mean", mean), ("std", std)):
            self.register_buffer(buffer, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        with torch.no_grad():
            self.dimension = self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)).shape[1]

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)` in [0, 255] to the network's input `(B, 3, size, size)`."""
        resized = self._resize(to_rgb(images, next(self.model.parameters()).dtype), self.size, mode=self.mode)
        return (resized / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        with full_precision():
            outputs = self.model(pixel_values=self.prepare(images))
            return self.pool(outputs).float()

    def pool(self, outputs: Any) -> Tensor:
        """The vector of each image `(B, d)` in the model's outputs."""
        if self.pooling == "image_embeds":
            return F.normalize(outputs.image_embeds, dim=1)
        if self.pooling == "pooler":
            return outputs.pooler_output.flatten(1)
        hidden = outputs.last_hidden_state  # (B, tokens, d) or (B, d, h, w)
        if self.pooling == "cls":
            return hidden[:, 0]
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def _normalization(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Name of a normalization in `resize`; empty for ImageNet's, which is usual."""
    known: dict[tuple, list[str]] = {(IMAGENET_MEAN, IMAGENET_STD): [], (CLIP_MEAN, CLIP_STD): ["clip"]}
    written = [f"{name}={','.join(map('{:.8g}'.format, each))}" for name, each in (("mean", mean), ("std", std))]
    return known.get((tuple(mean), tuple(std)), written)


def load_backbone(source: str, name: str, given: State) -> BackboneFeatures:
    """A backbone with the settings `given`; the preprocessor's configuration supplies a missing size, mean or std."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    at = {"revision": given.pop("revision")} if "revision" in given else {}
    try:
        config = AutoConfig.from_pretrained(source, **at)
        family = config.model_type.removesuffix("_vision_model")
        if hasattr(config, "text_config") and family != "clip":
            raise ValueError(f"{source} is a {family} of images and text: give a dotted path to your own callable.")
        loader = CLIPVisionModelWithProjection if family == "clip" else AutoModel
        model, report = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **at)
    except OSError as error:
        raise OSError(f"{source} cannot be loaded ({error}): run `hf download {source}`, or give a folder.") from error
    said = {} if {"size", "mean", "std"} <= given.keys() else _preprocessor_settings(source, at)
    usual = [pooling for pooling, families in POOLINGS.items() if family in families]
    settings = {"pooling": usual[0] if usual else None, **said, **given}
    lacking = [key for key in ("pooling", "size", "mean", "std") if settings.get(key) is None]
    if lacking:
        raise ValueError(f"{source}, a {family}, does not say how to use it: give {', '.join(lacking)}.")
    untrained = [key for key in report["missing_keys"] if "pooler" not in key or settings["pooling"] == "pooler"]
    if untrained:
        raise ValueError(f"{source} lacks weights of {config.model_type}, which would stay random: {untrained[:4]}.")
    for key in report["missing_keys"]:
        # an unused pooler is drawn anew in every process, and would change the network's digest
        model.set_submodule(re.match(r".*?pooler[^.]*", key)[0], nn.Identity())  # type: ignore[index]
    if config.model_type == "dinov2":
        fix_position_embeddings(model, settings["size"])
    return BackboneFeatures(model, name, **settings)


def _preprocessor_settings(source: str, at: dict[str, str]) -> State:
    """Size, mean, std and mode in the preprocessor's configuration; empty if there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(source, **at)
    except OSError:
        return {}  # the caller then asks for them by name
    size: Any = (said.get("do_center_crop") and said.get("crop_size")) or said.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    mean, std = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize") is False:
        mean, std = (0, 0, 0), (1, 1, 1)
    return {"size": size, "mean": mean, "std": std, "mode": RESAMPLING.get(said.get("resample"), "bicubic")}


@torch.no_grad()
def fix_position_embeddings(model: Any, size: int) -> None:
    """
    Resamples DINOv2's position embeddings once, as its authors' code does: the bicubic grid is read at multiples of
    `37 / 16.1` for 16 patches of the 37 it was trained with; transformers takes `37 / 16`.
    """
    embeddings = model.embeddings
    positions = embeddings.position_embeddings  # (1, 1 + patches, d)
    trained, wanted = round((positions.shape[1] - 1) ** 0.5), size // embeddings.patch_embeddings.patch_size[0]
    if trained == wanted:
        return
    # in float64: a machine's own rounding would change the weights' digest
    grid = positions[:, 1:].double().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    factor = (wanted + 0.1) / trained
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    resampled = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)
    embeddings.position_embeddings = nn.Parameter(resampled, requires_grad=False)
