# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated sets, which take images in batches and compute a value at the end."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..conditions import Conditions, as_arguments
from ..metrics.distance import Distance
from ..metrics.extractors import FeatureExtractor, extract_features, freeze, move
from ..metrics.image_scores import RewardFunction, score_images
from .real import RealSource, build_distance


@runtime_checkable
class ImageMetric(Protocol):
    """A metric of a set of uint8 images in batches `(B, C, H, W)`; `higher_is_better` tells its direction."""

    def reset(self) -> None: ...

    def update(self, images: Tensor, conditions: Conditions | None) -> None: ...

    def compute(self) -> float: ...


class MeanScore:
    """Mean over a set of a function of single images; those for which it returns `None` do not count."""

    higher_is_better = True

    def __init__(self, reward: RewardFunction):
        self.reward = reward
        self.reset()

    def to(self, device: torch.device) -> None:
        move(self.reward, device)

    def reset(self) -> None:
        self._scores: list[Tensor] = []

    def update(self, images: Tensor, conditions: Conditions | None = None) -> None:
        named = {getattr(self.reward, "__name__", type(self.reward).__name__): self.reward}
        self._scores += score_images(named, images, **as_arguments(conditions, images.device))

    def compute(self) -> float:
        return torch.cat(self._scores).nanmean().item()


def as_metric(name: str, metric: ImageMetric | RewardFunction) -> ImageMetric:
    """Takes a metric as it is; of a function of single images, the mean."""
    if isinstance(metric, type) or not (isinstance(metric, ImageMetric) or callable(metric)):
        remedy = "pass an object with reset(), update(images, conditions) and compute(), or a function of images"
        raise ValueError(f"eval_metrics[{name!r}] is {metric!r}: {remedy}.")
    return metric if isinstance(metric, ImageMetric) else MeanScore(metric)


class FeatureDistance:
    """Distance of a generated set from `real` data in one space; arguments as in [`SubsetReplaceReward`]."""

    higher_is_better = False

    def __init__(
        self,
        feature_extractor: FeatureExtractor,
        real: RealSource,
        distance: str | Callable[..., Distance] = "frechet",
        real_resize: int | None = None,
    ):
        self.extractor = freeze(feature_extractor)
        self.distance = build_distance(distance, real, feature_extractor, real_resize)
        self.reset()

    def to(self, device: torch.device) -> None:
        move(self.extractor, device)

    def reset(self) -> None:
        self._features: list[Tensor] = []

    def update(self, images: Tensor, conditions: Conditions | None = None) -> None:
        dimension = getattr(self.distance, "dimension", None)
        self._features.append(extract_features(self.extractor, images, conditions, dimension))

    def compute(self) -> float:
        return self.distance.fit(torch.cat(self._features)).value
