# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Features of a set of images, computed by any number of processes and stored in one file per shard.

Killed at any time, the same call continues with the shards that are missing. Batches never span shards, and moments
are accumulated in the order of the set, so the result is the same to the last bit for any number of processes.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from .. import __version__
from ..files import write_json, written_whole
from ..metrics.extractors import FeatureExtractor, describe_extractor, extract_features, freeze, move
from ..metrics.statistics import FeatureStatistics
from .decoding import StoredImage, UnreadableImage, decode_image
from .sources import ImageSource

_PATTERN, _SETTINGS = "features-*.safetensors", "settings.json"
_BLOCK = 4096  # rows that enter the moments together; the last bits of the sums depend on it
LIBRARY = f"trl-distreward {__version__}, torch {version('torch')}, pillow {version('pillow')}"  # what features are of


def start_processes() -> PartialState:
    """Returns the state of this process; processes wait for each other as long as needed."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


class CollectedFeatures:
    """Features of a set, in files in the order of the set."""

    def __init__(self, paths: Sequence[Path]):
        self.paths: list[Path] = []
        self.skipped: list[str] = []  # one message for each image that was left out
        sizes = set()
        for path in paths:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                self.skipped += about["skipped"]
                if file.keys():
                    self.paths.append(path)
                    sizes.add(about["size"])
        if not self.paths:
            raise ValueError(f"none of the {len(self.skipped)} images can be read: {self.skipped[0]}")
        if len(sizes) > 1:
            raise ValueError(f"images have {' and '.join(sorted(sizes))} pixels: pass --resize N.")
        self.image_size = sizes.pop()  # height x width

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Features of one extractor in float32, at most 4096 rows at a time."""
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                yield from file.get_tensor(name).split(_BLOCK)

    def features(self, name: str) -> Tensor:
        """Features `(N, d)` of one extractor in float32."""
        return torch.cat(list(self.blocks(name)))

    def statistics(self, name: str, metadata: Mapping[str, str] | None = None) -> FeatureStatistics:
        """Moments of one extractor's features, of which only a block is in memory at a time."""
        statistics = FeatureStatistics(next(self.blocks(name)).shape[1], metadata)
        for block in self.blocks(name):
            statistics.update(block)
        return statistics


class _Batches(IterableDataset):
    """Decoded batches of shards: a shard's index, images (`None` at its end), and messages of unreadable ones."""

    def __init__(self, source: ImageSource, shards: list[int], batch_size: int, resize: int | None):
        self.source, self.shards, self.batch_size, self.resize = source, shards, batch_size, resize

    def __iter__(self) -> Iterator[tuple[int, list[StoredImage] | None, list[str]]]:
        worker = torch.utils.data.get_worker_info()
        for shard in self.shards if worker is None else self.shards[worker.id :: worker.num_workers]:
            stored = self.source.shard(shard, self.batch_size)
            while batch := list(islice(stored, self.batch_size)):
                decoded, skipped = [], []
                for image in batch:
                    try:
                        decoded.append(StoredImage(image.name, decode_image(image, self.resize), image.prompt))
                    except UnreadableImage as error:
                        skipped.append(str(error))
                yield shard, decoded, skipped
            yield shard, None, []


def collect_features(
    source: ImageSource,
    extractors: Mapping[str, FeatureExtractor],
    folder: str | os.PathLike,
    *,
    batch_size: int = 64,
    resize: int | None = None,
    skip_corrupt: bool = False,
    num_workers: int = 4,
) -> CollectedFeatures:
    """
    Computes the features of all images of a set. All processes call it. A `ValueError` says that an image cannot be
    read or has another size than the others, that features are not finite, or that the folder holds other work.

    Args:
        extractors (`dict[str, Callable]`): each maps uint8 images `(B, 3, H, W)`, and prompts if it needs conditions,
            to features `(B, d)`.
        folder (`str` or `os.PathLike`): folder that all processes share; unfinished work in it is continued.
        resize (`int`, *optional*): side to which images are cropped and resized; otherwise all must have one size.
        skip_corrupt (`bool`, *optional*, defaults to `False`): leave out images that cannot be read.
        num_workers (`int`, *optional*, defaults to 4): worker processes that decode images, for each process.
    """
    state, folder = PartialState(), Path(folder)
    about = {name: describe_extractor(freeze(extractor)) for name, extractor in extractors.items()}
    settings = {"images": source.description, "extractors": about, "batch_size": batch_size, "resize": resize}
    settings["library"] = LIBRARY
    _begin(folder, settings, state)
    paths = [folder / _PATTERN.replace("*", f"{i:05d}") for i in range(source.num_shards(batch_size))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    state.wait_for_everyone()  # before the first file appears: all processes share out the same shards
    mine = missing[state.process_index :: state.num_processes]
    for extractor in extractors.values():
        move(extractor, state.device)
    workers = min(num_workers, len(mine), os.cpu_count() or 1) if source.in_workers else 0
    batches = DataLoader(_Batches(source, mine, batch_size, resize), batch_size=None, num_workers=workers)
    columns: dict[int, defaultdict[str, list[Tensor]]] = {i: defaultdict(list) for i in mine}
    messages: dict[int, list[str]] = {i: [] for i in mine}
    size: tuple[int, ...] = ()
    bar = tqdm(total=len(mine), desc="features", unit="shard", disable=not state.is_main_process)
    for shard, images, skipped in batches:
        messages[shard] += skipped
        if skipped and not skip_corrupt:
            raise UnreadableImage(skipped[0])
        if images is None:
            rows = {name: torch.cat(each).cpu() for name, each in columns.pop(shard).items()}
            with written_whole(paths[shard]) as file:
                found = {"skipped": messages.pop(shard), "size": "x".join(map(str, size[1:]))}
                file.write(save(rows, {"about": json.dumps(found)}))
            bar.update()
        elif images:
            size = size or images[0].content.shape
            odd = next((image for image in images if image.content.shape != size), None)
            if odd is not None:
                raise ValueError(f"{odd.name} has the shape {odd.content.shape}, others have {size}: pass --resize N.")
            pixels = torch.from_numpy(np.stack([image.content for image in images])).to(state.device)
            prompts = None if images[0].prompt is None else [image.prompt for image in images]
            try:
                for name, extractor in extractors.items():
                    columns[shard][name].append(extract_features(extractor, pixels, prompts, name=name))
            except torch.OutOfMemoryError as error:
                remedy = f"lower --batch-size, {batch_size}, of trl-distreward statistics or evaluate"
                raise torch.OutOfMemoryError(f"features run out of memory: {remedy}.\n{error}") from error
    bar.close()
    state.wait_for_everyone()
    collected = CollectedFeatures(paths)
    state.wait_for_everyone()  # before the main process may remove the files
    if collected.skipped and not skip_corrupt:
        raise UnreadableImage(collected.skipped[0])
    return collected


def _begin(folder: Path, settings: Mapping[str, object], state: PartialState) -> None:
    """Writes the settings of new work into its folder; compares them with those of unfinished work."""
    path = folder / _SETTINGS
    if state.is_main_process and not any(folder.glob(_PATTERN)):
        write_json(path, settings)
    state.wait_for_everyone()
    held, asked = json.loads(path.read_text()), json.loads(json.dumps(settings))
    changed = [f"{name} was {held[name]} and is {asked[name]}" for name in asked if held[name] != asked[name]]
    if changed:
        raise ValueError(f"{folder} holds work of other settings: {'; '.join(changed)}. Name another folder.")
