# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Images of a policy, written in shards that processes share out.

An image is fixed by the seed and its number, a shard by the batch size as well: any number of processes writes the
same files, and a run that was killed makes those that are missing.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import trange

from ..conditions import balanced_labels, take
from ..files import written_whole
from ..generation import SamplingSchedule, generate_images
from ..metrics.extractors import network_digest
from ..policies import DiffusionPolicy
from .collect import claim_folder
from .files import save_sample_npz
from .sources import SETTINGS, SHARD_PATTERN, ShardedImages

LABELS = ("balanced", "random")


@dataclass(frozen=True)
class GenerationPlan:
    """
    Which images are made.

    Args:
        num_images (`int`): how many.
        schedule ([`~generation.SamplingSchedule`]): how each is sampled.
        labels (`str`, *optional*, defaults to `"balanced"`): `"balanced"`, all classes in turn, or `"random"`, drawn
            independently and uniformly.
        seed (`int`, *optional*, defaults to 0): of the noise and of random labels.
        batch_size (`int`, *optional*, defaults to 64): images at a time, and in a shard.
    """

    num_images: int
    schedule: SamplingSchedule
    labels: str = "balanced"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.num_images < 2 or self.batch_size < 1:
            raise ValueError(
                f"num_images={self.num_images} and batch_size={self.batch_size}: at least 2 images in batches of at "
                "least 1 are needed."
            )
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r} is unknown: choose one of {', '.join(LABELS)}.")

    def conditions(self, num_classes: int | None) -> Tensor:
        """Labels `(num_images,)`."""
        if num_classes is None:
            raise ValueError("this pipeline has no classes: generate its images yourself and evaluate their folder.")
        if self.labels == "balanced":
            return balanced_labels(self.num_images, num_classes)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(num_classes, (self.num_images,), generator=generator)

    def shard(self, index: int) -> range:
        start = index * self.batch_size
        return range(start, min(start + self.batch_size, self.num_images))

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.batch_size)


def networks_of(policy: DiffusionPolicy) -> dict[str, nn.Module]:
    """All networks of a policy's pipeline."""
    components: Mapping[str, Any] = getattr(getattr(policy, "pipeline", None), "components", None) or {}
    networks = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    return networks or {"model": policy.model}


def shard_path(folder: Path, index: int) -> Path:
    return folder / SHARD_PATTERN.replace("*", f"{index:06d}")


def generate_shards(
    policy: DiffusionPolicy,
    plan: GenerationPlan,
    folder: str | os.PathLike,
    *,
    description: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ShardedImages:
    """
    Writes the images of a plan to `images-*.npy` files, uint8 `(n, H, W, C)`. All processes call it.

    Args:
        policy ([`DiffusionPolicy`]): generator, on this process's device.
        plan ([`GenerationPlan`]): which images.
        folder (`str` or `os.PathLike`): on a file system that all processes share; unfinished work is gone on with.
        description (`dict`, *optional*): what else the images depend on, recorded to be compared on resuming.

    Raises:
        ValueError: the folder holds images of other settings or weights.
    """
    state, folder = PartialState(), Path(folder)
    settings = {"weights": network_digest(networks_of(policy)), **(description or {}), **asdict(plan)}
    claim_folder(folder, settings, state, SHARD_PATTERN)
    conditions = plan.conditions(policy.num_conditions)
    mine = [i for i in range(plan.num_shards) if not shard_path(folder, i).is_file()]
    state.wait_for_everyone()  # before the first writes one: all share out the same
    mine = mine[state.process_index :: state.num_processes]
    for i in trange(len(mine), desc="generation", unit="batch", disable=not (progress and state.is_main_process)):
        indices = plan.shard(mine[i])
        batches = generate_images(
            policy,
            take(conditions, indices),
            plan.schedule,
            seed=plan.seed,
            batch_size=plan.batch_size,
            indices=indices,
        )
        (images,) = (images for images, _ in batches)
        with written_whole(shard_path(folder, mine[i])) as file:
            np.save(file, images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    state.wait_for_everyone()
    return ShardedImages(folder)


def remove_shards(generated: ShardedImages) -> None:
    """Deletes the files that [`generate_shards`] wrote, and the folder if it holds no others."""
    folder = generated.paths[0].parent
    for path in (*generated.paths, folder / SETTINGS):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def save_shards_as_npz(generated: ShardedImages, path: str | os.PathLike, labels: Tensor) -> None:
    """The images of shards as an ADM sample, gray ones as RGB."""

    def blocks() -> Iterator[np.ndarray]:
        for shard in generated.paths:
            images = np.load(shard)
            yield images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)

    height, width = np.load(generated.paths[0], mmap_mode="r").shape[1:3]
    save_sample_npz(path, blocks(), (len(generated), height, width, 3), labels.numpy())
