# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors by name: Inception-v3, DINOv2, CLIP, any vision backbone of transformers, one's own callable.

What comes back is an `nn.Module`, frozen, from images `(B, 3 or 1, H, W)` in [0, 255] to features `(B, d)` in float32,
with gradients to images that are floating-point. Its `name`, `resize` and `dimension` belong into the metadata of
statistics: distances between features that differ in one of them mean nothing.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..importing import resolve
from ..sampling import send
from .inception import load_inception
from .preprocessing import full_precision, resize_antialiased, resize_pillow, to_rgb

FeatureExtractor = Callable[..., Tensor]
FEATURE_BATCH = 256  # images that go through an extractor at a time
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POOLINGS = ("cls", "mean", "pooler", "image_embeds")
RESIZES = {"torch": resize_antialiased, "pillow": resize_pillow}
# What is the image's vector is known of these families; others must say it.
POOLING_OF = {
    "clip": "image_embeds",
    "convnext": "pooler",
    "convnextv2": "pooler",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "dinov3_vit": "cls",
    "ijepa": "mean",
    "resnet": "pooler",
    "swin": "pooler",
    "swinv2": "pooler",
    "vit": "cls",
}
_INCEPTION_OPTIONS = ("output", "sha256")
_BACKBONE_OPTIONS = ("pooling", "size", "mean", "std", "mode", "revision")
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor configurations write them


def network_digest(networks: nn.Module | Mapping[str, nn.Module]) -> str:
    """
    A digest of all weights and buffers, shapes and dtypes included.

    Names of tensors within a network are left out: they change with the version of the library that loads them.
    """
    named = {"": networks} if isinstance(networks, nn.Module) else networks
    digest = hashlib.blake2b(digest_size=16)
    for name, network in sorted(named.items()):
        digest.update(name.encode() + b"\n")
        for content in sorted(map(_tensor_digest, network.state_dict().values())):
            digest.update(content)
    return digest.hexdigest()


def extractor_digest(extractor: Any) -> str | None:
    """Of the network behind an extractor, `None` where there is none."""
    module = module_of(extractor)
    return None if module is None else network_digest(module)


def module_of(extractor: Any) -> nn.Module | None:
    """The module behind an extractor: itself, the owner of a bound method, or what a wrapper holds as `extractor`."""
    owner = getattr(extractor, "__self__", extractor)
    if isinstance(owner, nn.Module):
        return owner
    inner = getattr(owner, "extractor", None)
    return None if inner is None else module_of(inner)


def _tensor_digest(value: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tuple(value.shape)} {value.dtype}".encode(), digest_size=16)
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def freeze(extractor: FeatureExtractor) -> FeatureExtractor:
    """The module behind an extractor is put in evaluation mode and never trained."""
    module = module_of(extractor)
    if module is not None:
        module.requires_grad_(False).eval()
    return extractor


def extract_features(
    extractor: FeatureExtractor,
    images: Tensor,
    conditions: Any = None,
    dimension: int | None = None,
    name: str = "features",
    check_finite: bool = True,
    batch_size: int = FEATURE_BATCH,
    gradient: bool = False,
) -> Tensor:
    """
    Features `(M, d)` in float32 of uint8 images `(M, C, H, W)`.

    An extractor with a true attribute `needs_conditions` is called with the images' conditions as well. At most
    `batch_size` images go through it at a time. With `gradient` the images are float32, in the same range, and
    features carry gradients to them.

    Raises:
        ValueError: the extractor changed the batch size, gave another dimension than `dimension`, or NaN or infinite
            values.
    """
    needs_conditions = getattr(extractor, "needs_conditions", False)
    if needs_conditions and conditions is None:
        raise ValueError(f"feature extractor {name!r} sees images beside their conditions: pass conditions too.")
    chunks = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        with torch.set_grad_enabled(gradient):
            values = extractor(part, conditions[start : start + batch_size]) if needs_conditions else extractor(part)
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(part):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"feature extractor {name!r} returned {shape} for {len(part)} images: it must return one row per "
                f"image, ({len(part)}, d)."
            )
        chunks.append(values)
    values = torch.cat(chunks)
    if dimension is not None and values.shape[1] != dimension:
        raise ValueError(
            f"feature extractor {name!r} gives dimension {values.shape[1]}, but its real statistics have {dimension}: "
            "recompute the statistics with this extractor."
        )
    if check_finite and not values.isfinite().all():
        bad = (~values.isfinite()).any(dim=1).sum().item()
        raise ValueError(
            f"feature extractor {name!r} gave NaN or infinite values for {bad} of {len(images)} images: "
            "run it in float32 and check the images."
        )
    return values.float()


class JointFeatures:
    """
    Features of an image beside its class: a distance between such features sees whether images answer their labels.

    The distance of images alone is blind to labels: swapping the images of two classes leaves it as it was, so nothing
    holds a fine-tuned generator to its conditions. Here the covariance of features and label is part of the moments.

    Args:
        feature_extractor (`Callable`): uint8 images `(B, C, H, W)` to features `(B, d)`.
        num_classes (`int`): number of classes; labels become one-hot vectors.
        scale (`float`, *optional*, defaults to 1.0): what a label is worth: the one-hot vectors are multiplied by it.

    Example:

    ```python
    >>> joint = JointFeatures(inception, num_classes=1000)
    >>> reward = SubsetReplaceReward(joint, FeatureStatistics.from_features(joint(real_images, real_labels)))
    ```
    """

    needs_conditions = True

    def __init__(self, feature_extractor: FeatureExtractor, num_classes: int, scale: float = 1.0):
        self.extractor = freeze(feature_extractor)
        self.num_classes = num_classes
        self.scale = scale

    def __call__(self, images: Tensor, conditions: Any) -> Tensor:
        features = self.extractor(images)  # (B, d)
        labels = send(torch.as_tensor(conditions), features.device).long()
        return torch.cat([features, self.scale * F.one_hot(labels, self.num_classes).to(features)], dim=1)


class BackboneFeatures(nn.Module):
    """
    Features of a vision backbone of transformers, computed in float32 without autocast or TF32.

    Args:
        model (`torch.nn.Module`): called with `pixel_values`, answers with one of transformers' outputs.
        name (`str`): what to call these features in metadata.
        pooling (`str`):
            which vector stands for the image: `"cls"`, the first token after the final normalization; `"mean"`, over
            all tokens or positions; `"pooler"`, the model's `pooler_output`; `"image_embeds"`, CLIP's projection,
            of length 1.
        size (`int`): side of the network's input; the whole image is resized to it, nothing is cropped.
        mean, std (`tuple[float]` of length 3): of each colour, for values in [0, 1].
        resize (`str`, *optional*, defaults to `"torch"`):
            `"torch"`: antialiased, unrounded, on the images' device. `"pillow"`: equal to Pillow's resize of 8-bit
            images, to the bit.
        mode (`str`, *optional*, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`.

    Attributes:
        name (`str`), dimension (`int`): what to record with statistics of these features.
        resize (`str`):
            to be recorded too: how images become features, all of it that is not in the weights:
            `"torch-bicubic-224"` for the class token of images normalized as ImageNet, else longer, as
            `"pillow-bicubic-336-image_embeds-clip"`.
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
            raise ValueError(
                f"resize={resize!r} with mode={mode!r} is unknown: resize is 'torch' or 'pillow', mode 'bicubic' or "
                "'bilinear'."
            )
        if size < 1 or len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"size={size}, mean={mean}, std={std}: a size is at least 1, mean and std have one value per colour."
            )
        self.model, self.pooling, self.size, self.mode = model, pooling, size, mode
        unusual = [*([pooling] if pooling != "cls" else []), *_normalization(mean, std)]
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
        resized = self._resize(to_rgb(images, next(self.model.parameters()).dtype), self.size, self.mode)
        return (resized / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
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
    """What to call means and standard deviations: nothing for ImageNet's, which are usual."""
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return []
    if (tuple(mean), tuple(std)) == (CLIP_MEAN, CLIP_STD):
        return ["clip"]
    written = (",".join(f"{value:.8g}" for value in values) for values in (mean, std))
    return [f"{name}={values}" for name, values in zip(("mean", "std"), written, strict=True)]


class CallableFeatures(nn.Module):
    """A callable from images to features, its module frozen and moved along; arguments pass through."""

    def __init__(self, extractor: Callable[..., Tensor], name: str):
        super().__init__()
        self.extractor = freeze(extractor)
        self.module = module_of(extractor)
        self.name = name
        self.resize = str(getattr(extractor, "resize", name))  # its own business, told by its name
        self.dimension: int | None = getattr(extractor, "dimension", None)
        self.needs_conditions = getattr(extractor, "needs_conditions", False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.extractor(*args, **kwargs)


def load_feature_extractor(
    name: str,
    device: torch.device | str | None = None,
    *,
    source: str | os.PathLike | None = None,
    resize: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """
    A feature extractor by its name.

    Args:
        name (`str`):
            `"inception"`: the FID network, [`load_inception`]. `"dinov2"`: `facebook/dinov2-large` at 224x224, the
            final class token, 1024-d, as FD-DINOv2 (arXiv 2306.04675) has it. `"clip"`:
            `openai/clip-vit-large-patch14-336`, the normalized projection, 768-d, as CMMD (arXiv 2401.09603) has it. A
            Hub id or a folder: a vision backbone of transformers. A dotted path: a callable of one's own, from uint8
            images to features.
        device (`torch.device` or `str`, *optional*): where to put it; the trainer moves it by itself.
        source (`str` or path, *optional*):
            where the weights of `"inception"`, `"dinov2"` or `"clip"` come from: a file, or a folder or Hub id.
        resize (`str`, *optional*):
            `"tensorflow"`, `"pytorch"` or `"clean"` for Inception, `"torch"` or `"pillow"` for the others, as
            [`InceptionV3`] and [`~metrics.BackboneFeatures`] say. By default `"tensorflow"`, and what the metric's
            reference does: `"torch"` for DINOv2 (EDM2's), `"pillow"` for CLIP.
        kwargs: further arguments of [`load_inception`] (`output`, `sha256`), or for backbones `pooling`, `size`,
            `mean`, `std`, `mode` of [`~metrics.BackboneFeatures`], in place of what the preprocessor's configuration
            says, and `revision`.

    Raises:
        ValueError: the name means nothing, or says too little of how to use the backbone.
        OSError: weights are neither here nor to be had, with what to put where.

    Example:

    ```python
    >>> dinov2 = load_feature_extractor("dinov2", device="cuda")
    >>> metadata = {"extractor": dinov2.name, "resize": dinov2.resize}
    >>> statistics = FeatureStatistics.from_features(dinov2(images), metadata)
    ```
    """
    if name == "inception":
        _check_options(name, kwargs, _INCEPTION_OPTIONS)
        return load_inception(source, resize=resize or "tensorflow", device=device, **kwargs)
    if name == "dinov2":
        known: dict[str, Any] = {
            "pooling": "cls",
            "size": 224,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "resize": "torch",
        }
        source = source or "facebook/dinov2-large"
    elif name == "clip":
        known = {"pooling": "image_embeds", "size": 336, "mean": CLIP_MEAN, "std": CLIP_STD, "resize": "pillow"}
        source = source or "openai/clip-vit-large-patch14-336"
    elif os.path.isdir(name) or "/" in name:
        known = {}
        source, name = name, Path(name).name if os.path.isdir(name) else name
    elif "." in name:
        if source or resize or kwargs:
            raise ValueError(f"{name} is a callable of your own: it takes no source, resize or {sorted(kwargs)}.")
        return _load_callable(name).to(device)
    else:
        raise ValueError(
            f"feature extractor {name!r} is unknown: give 'inception', 'dinov2', 'clip', a Hub id or a folder of a "
            "vision backbone, or a dotted path 'package.module.name'."
        )
    _check_options(name, kwargs, _BACKBONE_OPTIONS)
    if resize is not None:
        kwargs["resize"] = resize
    return _load_backbone(str(source), name, known, kwargs).to(device)


def _check_options(name: str, given: Mapping[str, Any], options: Sequence[str]) -> None:
    unknown = [option for option in given if option not in options]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it takes source, resize, {', '.join(options)}.")


def _load_callable(path: str) -> CallableFeatures:
    extractor = resolve(path)
    if not callable(extractor) or isinstance(extractor, type):
        raise ValueError(
            f"{path} is a {type(extractor).__name__}: a feature extractor is called with images and returns features."
        )
    return CallableFeatures(extractor, path)


def _load_backbone(source: str, name: str, known: Mapping[str, Any], given: dict[str, Any]) -> BackboneFeatures:
    """With what is `known` of the network or else its preprocessor says, but for what is `given`."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    at = {"revision": given.pop("revision")} if "revision" in given else {}
    try:
        config = AutoConfig.from_pretrained(source, **at)
        family = config.model_type.removesuffix("_vision_model")
        if hasattr(config, "text_config") and family != "clip":
            raise ValueError(f"{source} is a {family} of images and text: give a dotted path of what to take from it.")
        loader = CLIPVisionModelWithProjection if family == "clip" else AutoModel
        model, report = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **at)
    except OSError as error:
        raise OSError(
            f"{source} cannot be loaded ({error}): where there is a network, `hf download {source}` puts it into the "
            "cache of the Hub; or give a folder."
        ) from error
    settings = {**(known or _preprocessor_settings(source, at)), **given}
    settings.setdefault("pooling", POOLING_OF.get(family))
    lacking = [key for key in ("pooling", "size", "mean", "std") if settings.get(key) is None]
    if lacking:
        raise ValueError(
            f"how to use {source}, a {family}, is not known: give {', '.join(lacking)} (pooling is one of "
            f"{', '.join(POOLINGS)})."
        )
    untrained = [key for key in report["missing_keys"] if "pooler" not in key or settings["pooling"] == "pooler"]
    if untrained:
        raise ValueError(f"{source} lacks weights of {config.model_type}, which would stay random: {untrained[:4]}.")
    for key in report["missing_keys"]:
        # drawn anew in every process, and never used: without it a digest of the network is that of its weights
        parts = key.split(".")
        pooler = next(i for i, part in enumerate(parts) if "pooler" in part)
        model.set_submodule(".".join(parts[: pooler + 1]), nn.Identity())
    if config.model_type == "dinov2":
        fix_position_embeddings(model, settings["size"])
    return BackboneFeatures(model, name, **settings)


def _preprocessor_settings(source: str, at: dict[str, str]) -> dict[str, Any]:
    """Size, mean, std and mode of the preprocessor's configuration; empty if there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(source, **at)
    except OSError:
        return {}  # what is then lacking is asked for by name
    size: Any = said.get("crop_size") if said.get("do_center_crop") else None
    size = said.get("size") if size is None else size
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    settings = {"size": size, "mean": said.get("image_mean"), "std": said.get("image_std")}
    if said.get("do_normalize") is False:
        settings |= {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if said.get("resample") in RESAMPLING:
        settings["mode"] = RESAMPLING[said["resample"]]
    return settings


@torch.no_grad()
def fix_position_embeddings(model: Any, size: int) -> None:
    """
    Resamples DINOv2's position embeddings to images of `size` once, as its authors' code does: the bicubic grid is
    read at multiples of `37 / 16.1` for 16 patches of the 37 it was trained with, where transformers takes `37 / 16`.
    """
    embeddings = model.embeddings
    positions = embeddings.position_embeddings  # (1, 1 + patches, d)
    trained, wanted = round((positions.shape[1] - 1) ** 0.5), size // embeddings.patch_embeddings.patch_size[0]
    if trained == wanted:
        return
    # in float64, lest the machine's own rounding become part of the weights, whose digests are compared
    grid = positions[:, 1:].double().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    factor = (wanted + 0.1) / trained
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    resampled = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)
    embeddings.position_embeddings = nn.Parameter(resampled, requires_grad=False)
