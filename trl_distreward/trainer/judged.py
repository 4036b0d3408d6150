# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Samples as rewards see them: decoded a slice at a time, each slice's features taken before the next is decoded.

Nothing in between reads from the device: its kernels queue up, and of the images no more than a slice is held.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conditions import take
from ..policies import DiffusionPolicy, decode_slices
from .reward_functions import RewardFunctions


@dataclass
class Judged:
    """
    What is kept of K images.

    Attributes:
        features (`list[dict[str, torch.Tensor]]` of shapes `(K, d)`): per distribution reward and feature space.
        decoded (`torch.Tensor` of shape `(K,)`, bool): whether samples and decoded images are finite.
        images (`torch.Tensor` of shape `(K, C, H, W)`, uint8, or `None`): where a reward function looks at them.
    """

    features: list[dict[str, Tensor]]
    decoded: Tensor
    images: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence["Judged"]) -> "Judged":
        """Of the images of all parts."""
        spaces = zip(*(part.features for part in parts), strict=True)
        features = [{space: torch.cat([rows[space] for rows in group]) for space in group[0]} for group in spaces]
        images = [part.images for part in parts if part.images is not None]
        return cls(features, torch.cat([part.decoded for part in parts]), torch.cat(images) if images else None)

    @classmethod
    def pick(cls, candidates: Sequence["Judged"], best: Tensor) -> "Judged":
        """Row by row, that of candidate `best` `(K,)`."""
        rows = torch.arange(len(best), device=best.device)
        spaces = zip(*(candidate.features for candidate in candidates), strict=True)
        features = [{s: torch.stack([one[s] for one in group])[best, rows] for s in group[0]} for group in spaces]
        images = [candidate.images for candidate in candidates if candidate.images is not None]
        decoded = torch.stack([candidate.decoded for candidate in candidates])[best, rows]
        return cls(features, decoded, torch.stack(images)[best, rows] if images else None)

    @property
    def finite(self) -> bool:
        """Whether all samples, images and features are."""
        flags = [values.isfinite().all() for spaces in self.features for values in spaces.values()]
        return bool(torch.stack([self.decoded.all(), *flags]).all())


class Judge:
    """
    Takes of samples what the rewards need.

    Args:
        policy ([`DiffusionPolicy`]): decodes.
        rewards ([`RewardFunctions`]): whose feature extractors see the images.
        batch_size (`int` or `None`): samples decoded at a time; all where it is `None`.
        device (`torch.device`): where it happens.
        keep_images (`bool`, *optional*, defaults to `False`): whether images are kept besides their features.

    Attributes:
        stopwatch ([`Stopwatch`]): time of the extractors.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        rewards: RewardFunctions,
        batch_size: int | None,
        device: torch.device,
        keep_images: bool = False,
    ):
        self.policy, self.rewards, self.batch_size, self.keep_images = policy, rewards, batch_size, keep_images
        self.stopwatch = Stopwatch(device)

    @torch.no_grad()
    def __call__(self, x: Tensor, conditions: Any) -> Judged:
        """Of samples `(K, ...)` and their conditions; what is not finite may have features that are."""
        parts, start = [], 0
        for images, decoded in decode_slices(self.policy, x, self.batch_size):
            batch = take(conditions, range(start, start + len(images)))
            start += len(images)
            with self.stopwatch.running():
                features = [r.extract(images, batch, check_finite=False) for r in self.rewards.distributional]
            parts.append(Judged(features, decoded, images if self.keep_images else None))
        return Judged.cat(parts)


class Stopwatch:
    """Adds up the time that parts of the work take, on a GPU by its own clock and without waiting for it."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        first = self._now()
        yield
        self._spans.append((first, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last reading; on a GPU the work must have ended."""
        spans, self._spans = self._spans, []
        if self._on_cuda:
            return sum(first.elapsed_time(last) for first, last in spans) / 1000
        return sum(last - first for first, last in spans)
