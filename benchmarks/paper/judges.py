# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics that no reward uses: those of the paper's Table 4 in held-out features, and a second held-out network."""

from typing import Any

import torch
import torch.nn.functional as F
from runs import Digits
from torch import Tensor, nn

from trl_distreward import FeatureDistance, FeatureStatistics, feature_metrics
from trl_distreward.metrics import extract_features

NUM_REAL = 2000  # real images of the metrics that compare pairs
METRICS = ("kernel", "mmd", "precision", "recall", "density", "coverage")


class Autoencoder(nn.Module):
    """Codes of 32 numbers for uint8 images: features that labels did not shape."""

    def __init__(self, num_pixels: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(num_pixels, 256), nn.GELU(), nn.Linear(256, 32))
        self.decoder = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, num_pixels))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images.flatten(1).float() / 127.5 - 1)

    @classmethod
    def trained(cls, images: Tensor, steps: int = 1000) -> "Autoencoder":
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = cls(images[0].numel())
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            for _ in range(steps):
                part = images[torch.randint(0, len(images), (128,))]
                loss = F.mse_loss(model.decoder(model.features(part)), part.flatten(1).float() / 127.5 - 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.requires_grad_(False).eval()


class HeldOutFeatures:
    """Features of the generated images, collected once for all metrics."""

    def __init__(self, extractor: Any, real: Tensor):
        self.extractor, self.real = extractor, extract_features(extractor, real)
        self.collected, self.values = list[Tensor](), dict[str, float]()

    def metrics(self) -> dict[str, "OneOf"]:
        return {name: OneOf(self, name, feeds=name == METRICS[0]) for name in METRICS}


class OneOf:
    """One metric of the collected features; the first metric collects them."""

    def __init__(self, features: HeldOutFeatures, name: str, feeds: bool):
        self.features, self.name, self.feeds = features, name, feeds

    def reset(self) -> None:
        if self.feeds:
            self.features.collected, self.features.values = [], {}

    @torch.no_grad()
    def update(self, images: Tensor, conditions: Any) -> None:
        if self.feeds:
            self.features.collected.append(extract_features(self.features.extractor, images))

    def compute(self) -> float:
        if not self.features.values:
            collected = torch.cat(self.features.collected)
            self.features.values = feature_metrics(self.features.real, collected, METRICS)
        return self.features.values[self.name]


def heldout_metrics(prepared: Digits) -> dict[str, Any]:
    """Metrics of Table 4, except the held-out Fréchet distance, which is always evaluated."""
    autoencoder = Autoencoder.trained(prepared.images)
    statistics = FeatureStatistics.from_features(extract_features(autoencoder.features, prepared.images))
    heldout = HeldOutFeatures(prepared.heldout.last_features, prepared.images[:NUM_REAL])
    return {**heldout.metrics(), "fd_autoencoder": FeatureDistance(autoencoder.features, statistics)}


class LogOdds:
    """Log-odds that a classifier gives to the requested digit, for each image."""

    __name__ = "log_odds"

    def __init__(self, classifier: nn.Module):
        self.classifier = classifier

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        logits, asked = self.classifier(images), labels[:, None]
        return logits.gather(1, asked)[:, 0] - logits.scatter(1, asked, -torch.inf).logsumexp(dim=1)
