# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images of a policy as a set to evaluate."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..conditions import balanced_labels, take
from ..generation import SamplingSchedule, generate_images
from ..metrics.extractors import network_digest
from ..policies import DiffusionPolicy
from ..seeds import keyed_generator
from .decoding import StoredImage
from .sources import ImageSource


class GeneratedImages(ImageSource):
    """Images that a policy generates when they are read; `labels` are `"balanced"` over classes, or `"random"`."""

    in_workers = False  # the network is in this process
    is_stored = False

    def __init__(
        self,
        policy: DiffusionPolicy,
        num_images: int,
        schedule: SamplingSchedule,
        labels: str = "balanced",
        seed: int = 0,
        settings: Mapping[str, object] | None = None,
    ):
        self.policy, self.count, self.schedule, self.seed = policy, num_images, schedule.on(policy), seed
        classes = policy.num_conditions
        if classes is None:
            raise ValueError("this pipeline has no classes: generate its images yourself and evaluate their folder.")
        random = torch.randint(classes, (num_images,), generator=keyed_generator(seed, "labels"))
        self.labels = balanced_labels(num_images, classes) if labels == "balanced" else random
        components = getattr(getattr(policy, "pipeline", None), "components", {"model": policy.model})
        networks = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        self.description = {"num_images": num_images, "labels": labels, "seed": seed, **(settings or {})}
        self.description |= {"schedule": asdict(self.schedule), "weights": network_digest(networks)}

    def num_shards(self, batch_size: int) -> int:
        return -(-self.count // batch_size)

    def shard(self, index: int, batch_size: int) -> Iterator[StoredImage]:
        indices = range(index * batch_size, min((index + 1) * batch_size, self.count))
        options: dict[str, Any] = {"seed": self.seed, "indices": indices, "batch_size": batch_size}
        for images, _ in generate_images(self.policy, take(self.labels, indices), self.schedule, **options):
            for number, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                yield StoredImage(f"generated image {number}", image)
