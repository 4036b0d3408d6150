# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated sets: fed with batches of images, computed at the end.

Anything with `reset()`, `update(images, conditions)` and `compute() -> float` serves as a metric. An attribute
`higher_is_better` tells the report of a run which way is up.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling import send
from .digest import module_of
from .distances import build_distance

FeatureExtractor = Callable[..., Tensor]
FEATURE_BATCH = 256  # images that go through an extractor at a time


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


def freeze(extractor: FeatureExtractor) -> FeatureExtractor:
    """The module behind an extractor is put in evaluation mode and never trained."""
    module = module_of(extractor)
    if module is not None:
        module.requires_grad_(False).eval()
    return extractor


class ImageMetric(Protocol):
    """A metric over a set of uint8 images `(B, C, H, W)` that arrive in batches."""

    def reset(self) -> None: ...

    def update(self, images: Tensor, conditions: Any) -> None: ...

    def compute(self) -> float: ...


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


class MeanScore:
    """
    Mean of a reward of single images over a generated set, e.g. of [`~rewards.per_image.pick_score`].

    Args:
        reward (`Callable`): `reward(images=…, conditions=…)`, one number per image.
    """

    higher_is_better = True

    def __init__(self, reward: Callable[..., Any]):
        self.reward = reward
        self._scores: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        module = module_of(self.reward)
        if module is not None:
            module.to(device)

    def reset(self) -> None:
        self._scores = []

    def update(self, images: Tensor, conditions: Any = None) -> None:
        scores = self.reward(images=images, conditions=conditions)
        self._scores.append(torch.as_tensor(scores, dtype=torch.float64).flatten().cpu())

    def compute(self) -> float:
        if not self._scores:
            raise ValueError("no images were given: call update(images, conditions) before compute().")
        return torch.cat(self._scores).mean().item()


class FeatureDistance:
    """
    Distance of a generated set from real data in one feature space.

    Args:
        feature_extractor (`Callable` or `torch.nn.Module`): uint8 images `(B, C, H, W)` to features `(B, d)`.
        real ([`FeatureStatistics`], features or path): the real data, as the distance wants it.
        distance (`str` or `Callable`, *optional*, defaults to `"frechet"`): as in [`SubsetReplaceReward`].

    Example:

    ```python
    >>> metric = FeatureDistance(extractor, "real.safetensors")
    >>> for images in batches:
    ...     metric.update(images)
    >>> metric.compute()
    ```
    """

    higher_is_better = False

    def __init__(
        self, feature_extractor: FeatureExtractor, real: Any, distance: str | Callable[[Any], Any] = "frechet"
    ):
        self.extractor = freeze(feature_extractor)
        self.distance = build_distance(distance, real, feature_extractor)
        self._features: list[Tensor] = []

    @classmethod
    def of(cls, feature_extractor: FeatureExtractor, distance: Any) -> "FeatureDistance":
        """The metric of a distance that is already built; it is fitted at every `compute`."""
        return cls(feature_extractor, None, lambda _: distance)

    def to(self, device: torch.device) -> None:
        module = module_of(self.extractor)
        if module is not None:
            module.to(device)

    def reset(self) -> None:
        self._features = []

    def update(self, images: Tensor, conditions: Any = None) -> None:
        dimension = getattr(self.distance, "dimension", None)
        self._features.append(extract_features(self.extractor, images, conditions, dimension))

    def compute(self) -> float:
        if not self._features:
            raise ValueError("no images were given: call update(images) before compute().")
        return self.distance.fit(torch.cat(self._features)).value
