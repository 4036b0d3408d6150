# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated sets, which take images in batches and compute a value at the end."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..conditions import Conditions
from ..metrics.distance import Distance
from ..metrics.extractors import FeatureExtractor, extract_features, freeze, move
from .real import RealSource, build_distance


class ImageMetric(Protocol):
    """A metric of a set of uint8 images in batches `(B, C, H, W)`; `higher_is_better` tells its direction."""

    def reset(self) -> None: ...

    def update(self, images: Tensor, conditions: Conditions | None) -> None: ...

    def compute(self) -> float: ...


class MeanScore:
    """Mean over a generated set of a reward of single images, `reward(images=…, conditions=…)`."""

    higher_is_better = True

    def __init__(self, reward: Callable[..., Tensor | Sequence[float]]):
        self.reward = reward
        self.reset()

    def to(self, device: torch.device) -> None:
        move(self.reward, device)

    def reset(self) -> None:
        self._scores: list[Tensor] = []

    def update(self, images: Tensor, conditions: Conditions | None = None) -> None:
        scores = self.reward(images=images, conditions=conditions)
        self._scores.append(torch.as_tensor(scores, dtype=torch.float64).flatten().cpu())

    def compute(self) -> float:
        return torch.cat(self._scores).mean().item()


class FeatureDistance:
    """
    Distance of a generated set from real data in one feature space. `real` is the `real_statistics` of
    [`SubsetReplaceReward`]; the other arguments mean the same as there.
    """

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
