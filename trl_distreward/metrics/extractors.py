# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors: loading them by name, freezing, digests of their weights, and extraction in batches."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditions import Conditions
from ..importing import resolve
from .backbones import NAMED, OPTIONS, load_backbone
from .checks import check_features
from .inception import load_inception

FeatureExtractor = Callable[..., Tensor]
FEATURE_BATCH = 256  # images that go through an extractor at a time


def module_of(extractor: object) -> nn.Module | None:
    """The module behind an extractor: itself, the owner of a bound method, or a wrapper's attribute `extractor`."""
    owner = getattr(extractor, "__self__", extractor)
    if isinstance(owner, nn.Module):
        return owner
    inner = getattr(owner, "extractor", None)
    return None if inner is None else module_of(inner)


def freeze(extractor: FeatureExtractor) -> FeatureExtractor:
    """Puts the module behind an extractor in evaluation mode, without gradients of its weights."""
    module = module_of(extractor)
    if module is not None:
        module.requires_grad_(False).eval()
    return extractor


def move(extractor: object, device: torch.device) -> None:
    """Moves the module behind an extractor, if there is one."""
    module = module_of(extractor)
    if module is not None:
        module.to(device)


def describe_extractor(extractor: object) -> dict[str, str | None]:
    """Name and resize of an extractor and digest of its network, which decide whether features can be compared."""
    module = module_of(extractor)
    return {
        "extractor": getattr(extractor, "name", None),
        "resize": getattr(extractor, "resize", None),
        "weights": None if module is None else network_digest(module),
    }


def network_digest(networks: nn.Module | Mapping[str, nn.Module]) -> str:
    """Digest of all weights and buffers; their names are left out, as they change with the library that loads them."""
    named = {"": networks} if isinstance(networks, nn.Module) else networks
    digest = hashlib.blake2b(digest_size=16)
    for name, network in sorted(named.items()):
        digest.update(name.encode() + b"\n")
        for content in sorted(map(_tensor_digest, network.state_dict().values())):
            digest.update(content)
    return digest.hexdigest()


def _tensor_digest(value: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tuple(value.shape)} {value.dtype}".encode(), digest_size=16)
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def extract_features(
    extractor: FeatureExtractor,
    images: Tensor,
    conditions: Conditions | None = None,
    dimension: int | None = None,
    name: str = "features",
    check_finite: bool = True,
    gradient: bool = False,
) -> Tensor:
    """
    Features `(M, d)`, float32, of images `(M, C, H, W)`, at most 256 at a time. With `gradient`, images are float32 in
    [0, 255] and features keep their graph. A `ValueError` under `name` says what is wrong with them.
    """
    if not getattr(extractor, "needs_conditions", False):
        conditions = None
    elif conditions is None:
        raise ValueError(f"feature extractor {name!r} takes images and their conditions: pass conditions too.")
    chunks = []
    for start in range(0, len(images), FEATURE_BATCH):
        part = images[start : start + FEATURE_BATCH]
        given = (part,) if conditions is None else (part, conditions[start : start + FEATURE_BATCH])
        with torch.set_grad_enabled(gradient):
            values = extractor(*given)
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(part):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"feature extractor {name!r} returned {got}: it must return ({len(part)}, d).")
        chunks.append(values)
    values = torch.cat(chunks)
    check_features(values if check_finite else values[:0], f"features of extractor {name!r}", dimension)
    return values.float()


class Joint:
    """Base of features of an image joined with those of its condition, times `scale`, which `fit` chooses."""

    needs_conditions = True
    scale: float | None
    extractor: FeatureExtractor

    def embed(self, conditions: Conditions, like: Tensor) -> Tensor:
        """Features of conditions `(B, e)`, on the device and in the dtype of `like`."""
        raise NotImplementedError

    @torch.no_grad()
    def fit(self, images: Tensor, conditions: Conditions) -> Self:
        """Sets `scale` so that both parts have the same total variance over a few thousand real images."""
        features = extract_features(self.extractor, images)
        variances = [values.double().var(dim=0).sum() for values in (features, self.embed(conditions, features))]
        self.scale = (variances[0] / variances[1]).sqrt().item()
        return self

    def forward(self, images: Tensor, conditions: Conditions) -> Tensor:
        if self.scale is None:
            raise ValueError("scale is not set: call fit(real_images, their_conditions) first, or give a number.")
        features = self.extractor(images)  # (B, d)
        return torch.cat([features, self.scale * self.embed(conditions, features)], dim=1)


class JointFeatures(Joint):
    """
    Features of an image joined with its class, so that the distance sees whether images match their labels: one of
    images alone does not change if the images of two classes are swapped. Labels become one-hot vectors of length
    `num_classes`, times `scale`, which `fit` chooses if it is not given.

    ```python
    >>> joint = JointFeatures(inception, num_classes=1000).fit(real_images, real_labels)
    >>> reward = SubsetReplaceReward(joint, FeatureStatistics.from_features(joint(real_images, real_labels)))
    ```
    """

    def __init__(self, feature_extractor: FeatureExtractor, num_classes: int, scale: float | None = None):
        self.extractor = freeze(feature_extractor)
        self.num_classes, self.scale = num_classes, scale

    def embed(self, conditions: Conditions, like: Tensor) -> Tensor:
        labels = torch.as_tensor(conditions).to(like.device, torch.long)
        return F.one_hot(labels, self.num_classes).to(like)

    def __call__(self, images: Tensor, conditions: Conditions) -> Tensor:
        return self.forward(images, conditions)


class CallableFeatures(nn.Module):
    """A user's function as an extractor with a name, whose network moves along."""

    def __init__(self, extractor: Callable[..., Tensor], name: str):
        super().__init__()
        self.extractor, self.module = freeze(extractor), module_of(extractor)
        self.name, self.resize = name, str(getattr(extractor, "resize", name))
        self.dimension: int | None = getattr(extractor, "dimension", None)
        self.needs_conditions = getattr(extractor, "needs_conditions", False)

    def forward(self, *args: object) -> Tensor:
        return self.extractor(*args)


def load_feature_extractor(
    name: str, *, source: str | os.PathLike | None = None, resize: str | None = None, **kwargs: Any
) -> nn.Module:
    """
    Loads a feature extractor by name.

    Args:
        name (`str`): `"inception"`, the FID network ([`load_inception`]); `"dinov2"`, the final class token of
            `facebook/dinov2-large` at 224x224, 1024-d, as in FD-DINOv2 (arXiv 2306.04675); `"clip"`, the normalized
            projection of `openai/clip-vit-large-patch14-336`, 768-d, as in CMMD (arXiv 2401.09603); a Hub id or a
            folder of a vision backbone of transformers; or the dotted path of your own callable.
        source (`str` or path, *optional*): file, folder or Hub id of other weights for a named extractor.
        resize (`str`, *optional*): as in [`InceptionV3`] or [`~metrics.BackboneFeatures`]; by default that of the
            metric's reference.
        kwargs: `output` of [`load_inception`]; for backbones `revision`, and `pooling`, `size`, `mean`, `std` and
            `mode` of [`~metrics.BackboneFeatures`], which override the preprocessor's configuration.
    """
    is_path = os.path.isdir(name) or "/" in name
    options = ("output",) if name == "inception" else OPTIONS if name in NAMED or is_path else ()
    if unknown := [option for option in kwargs if option not in options]:
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it takes source, resize, {', '.join(options)}.")
    if name == "inception":
        return load_inception(source, resize=resize or "tensorflow", **kwargs)
    if resize is not None:
        kwargs["resize"] = resize
    if name in NAMED:
        default, known = NAMED[name]
        return load_backbone(str(source or default), name, {**known, **kwargs})
    if is_path:
        return load_backbone(name, Path(name).name if os.path.isdir(name) else name, kwargs)
    if "." not in name:
        choices = "'inception', 'dinov2', 'clip', a Hub id or a folder of a vision backbone, or a dotted path"
        raise ValueError(f"feature extractor {name!r} is unknown: give {choices}.")
    extractor = resolve(name)
    if not callable(extractor) or isinstance(extractor, type):
        raise ValueError(f"{name} is a {type(extractor).__name__}: give a function of images that returns features.")
    return CallableFeatures(extractor, name)
