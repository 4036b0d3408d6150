# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated sets: fed with batches of images, computed at the end.

Anything with `reset()`, `update(images, conditions)` and `compute() -> float` serves as a metric. An attribute
`higher_is_better` tells the report of a run which way is up.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .distance import build_distance
from .extractors import FeatureExtractor, extract_features, freeze, module_of


class ImageMetric(Protocol):
    """A metric over a set of uint8 images `(B, C, H, W)` that arrive in batches."""

    def reset(self) -> None: ...

    def update(self, images: Tensor, conditions: Any) -> None: ...

    def compute(self) -> float: ...


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
