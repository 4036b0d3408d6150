# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Features of a set of images, shared out over processes and kept on disk as they come.

Each lane of the set has a file of features and a small file that says how far it is. A run that was killed goes on
from there. Batches are the lanes', whoever reads them, and moments are taken from the features in the set's order:
the result is the same to the last bit, however often the work was interrupted and however many processes shared it.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_json
from ..metrics.extractors import FeatureExtractor, extract_features, extractor_digest, freeze, module_of
from ..metrics.statistics import FeatureStatistics
from .decoding import StoredImage, UnreadableImage, decode_image
from .sources import SETTINGS, ImageSource, chain_lanes

_SAVE_EVERY = 8  # batches; what a killed process has to do again
_PROGRESS_PATTERN = "lane-*.json"
_BLOCK = 4096  # rows of a step of the moments: a constant, for the sums depend on it in their last bits

Decoder = Callable[[StoredImage], tuple[Tensor, str]]
Loaded = tuple[str, Tensor, str | None]  # name, image, prompt


@dataclass
class LaneProgress:
    """How far a lane is: images looked at, rows of features written, and what became of the others."""

    position: int = 0
    rows: int = 0
    dimension: int = 0
    done: bool = False
    skipped: list[str] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CollectedFeatures:
    """
    The features of a set, in lanes on disk.

    Attributes:
        folder (`Path`), lanes (`list`): where they are.
        image_size (`tuple[int, int]`): height and width of the images.
        weights (`str` or `None`): digest of the extractor's network, where it has one.
    """

    folder: Path
    lanes: list[LaneProgress]
    image_size: tuple[int, int]
    weights: str | None = None

    @property
    def count(self) -> int:
        return sum(lane.rows for lane in self.lanes)

    @property
    def dimension(self) -> int:
        return max(lane.dimension for lane in self.lanes)

    @property
    def skipped(self) -> list[str]:
        return [name for lane in self.lanes for name in lane.skipped]

    @property
    def modes(self) -> dict[str, int]:
        """How many images were stored in which mode."""
        return dict(sorted(sum((Counter(lane.modes) for lane in self.lanes), Counter()).items()))

    def blocks(self) -> Iterator[np.ndarray]:
        """Features `(at most 4096, d)` in float32, in the set's order."""
        for index, lane in enumerate(self.lanes):
            path = lane_path(self.folder, index)
            for start in range(0, lane.rows, _BLOCK):
                rows = min(_BLOCK, lane.rows - start)
                offset, count = 4 * start * lane.dimension, rows * lane.dimension
                yield np.fromfile(path, np.float32, count, offset=offset).reshape(rows, lane.dimension)

    def features(self) -> Tensor:
        """Features `(N, d)` in float32, in memory."""
        whole = np.empty((self.count, self.dimension), np.float32)
        start = 0
        for block in self.blocks():
            whole[start : start + len(block)] = block
            start += len(block)
        return torch.from_numpy(whole)

    def remove(self) -> None:
        """Deletes the files, and the folder if it holds no others."""
        for index in range(len(self.lanes)):
            lane_path(self.folder, index).unlink(missing_ok=True)
            lane_path(self.folder, index).with_suffix(".json").unlink(missing_ok=True)
        (self.folder / SETTINGS).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def statistics(self, metadata: Mapping[str, str] | None = None) -> FeatureStatistics:
        statistics = FeatureStatistics(self.dimension, metadata)
        for block in self.blocks():
            statistics.update(torch.from_numpy(block))
        return statistics


def lane_path(folder: Path, index: int) -> Path:
    return folder / f"lane-{index:02d}.f32"


def claim_folder(folder: Path, settings: Mapping[str, Any], state: PartialState, results: str) -> None:
    """
    Marks a folder as that of work with these settings; all processes call it.

    Args:
        folder (`Path`), settings (`dict`): what to mark, and with what.
        state (`PartialState`): of the processes.
        results (`str`): pattern of the files that work leaves: other settings are replaced where there are none yet.

    Raises:
        ValueError: the folder holds work with others.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or not any(folder.glob(results)):
            write_json(path, settings)
    state.wait_for_everyone()
    if not path.is_file():
        raise ValueError(f"{folder} is not seen by all processes: it must be on a file system that they share.")
    held, settings = _flat(json.loads(path.read_text())), _flat(settings)
    different = [name for name in {**held, **settings} if held.get(name) != settings.get(name)]
    if different:
        shown = "; ".join(f"{name} was {held.get(name)!r} and is {settings.get(name)!r}" for name in different)
        raise ValueError(
            f"{folder} holds work that was begun with other settings: {shown}. Give the same again to go on with it, "
            "name another folder, or remove this one."
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of settings by names such as `"extractor.weights"`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def collect_features(
    source: ImageSource,
    extractor: FeatureExtractor,
    folder: str | os.PathLike,
    *,
    name: str,
    description: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    resize: int | None = None,
    skip_corrupt: bool = False,
    num_workers: int = 4,
    progress: bool = True,
) -> CollectedFeatures:
    """
    Features of all images of a set. All processes call it; a folder of unfinished work is gone on with.

    Args:
        source ([`ImageSource`]): the images.
        extractor (`Callable`): uint8 images `(B, 3, H, W)`, and prompts if it needs conditions, to features `(B, d)`.
        folder (`str` or `os.PathLike`): where features are kept; on a file system that all processes share.
        name (`str`): of the extractor, for messages.
        description (`dict`, *optional*): what else the features depend on, recorded to be compared on resuming.
        batch_size (`int`, *optional*, defaults to 64): images at a time; part of what is recorded.
        resize (`int`, *optional*): see [`~evaluation.decoding.decode_image`]; without it all images must be of one
            size.
        skip_corrupt (`bool`, *optional*, defaults to `False`): leave out images that cannot be read. Work that was
            begun without can be gone on with.
        num_workers (`int`, *optional*, defaults to 4): threads that decode.
        progress (`bool`, *optional*, defaults to `True`): whether the main process shows a bar.

    Raises:
        ValueError: an image that cannot be read or is of another size than the first, features that are not finite;
            the message names the files. A folder of other work.
    """
    for option, value in (("batch_size", batch_size), ("resize", resize), ("num_workers", num_workers)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    state, folder = PartialState(), Path(folder)
    module = module_of(freeze(extractor))
    weights = extractor_digest(extractor)
    decode = partial(decode_image, resize=resize)
    first_name, size = _first_size(source, batch_size, decode, skip_corrupt)
    about = {"name": name, "weights": weights, **(description or {})}
    settings = {"images": source.description, "extractor": about, "batch_size": batch_size, "image_resize": resize}
    claim_folder(folder, settings, state, _PROGRESS_PATTERN)
    if module is not None:
        module.to(state.device)
    num_lanes = source.num_lanes(batch_size)
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(desc=_bar_name(name, state), unit=" images", disable=not (progress and state.is_main_process)) as bar,
    ):
        for index in range(state.process_index, num_lanes, state.num_processes):
            lane = _Lane(folder, index)
            if lane.progress.skipped and not skip_corrupt:  # by work that was begun with it
                raise UnreadableImage(lane.progress.skipped[0])
            batches = _decoded(source.lane(index, batch_size, lane.progress.position), batch_size, pool, decode)
            while not lane.progress.done:
                loaded = _load(next(batches, []), lane.progress, skip_corrupt)
                for image_name, image, _ in loaded:
                    if resize is None and tuple(image.shape[1:]) != size:
                        raise _mixed_sizes(first_name, size, image_name, tuple(image.shape[1:]), folder)
                lane.write(_extract(extractor, loaded, name, state.device) if loaded else None)
                bar.update(len(loaded))
    state.wait_for_everyone()
    collected = CollectedFeatures(folder, [read_progress(folder, index) for index in range(num_lanes)], size, weights)
    state.wait_for_everyone()  # whoever is first may remove the files
    if not all(lane.done for lane in collected.lanes):
        raise ValueError(f"{folder} lacks the features of other processes: put it on a file system that all share.")
    if collected.count == 0:
        raise ValueError(f"none of the {len(collected.skipped)} images could be read: {collected.skipped[0]}")
    return collected


def _bar_name(name: str, state: PartialState) -> str:
    return name if state.num_processes == 1 else f"{name}, the first of {state.num_processes} processes"


def read_progress(folder: Path, index: int) -> LaneProgress:
    """How far a lane is: at its beginning, if the file of its features lacks some of those that it had."""
    features = lane_path(folder, index)
    path = features.with_suffix(".json")
    if not path.is_file():
        return LaneProgress()
    progress = LaneProgress(**json.loads(path.read_text()))
    size = features.stat().st_size if features.is_file() else 0
    return progress if size >= 4 * progress.rows * progress.dimension else LaneProgress()


class _Lane:
    """The files of a lane: features are appended, and count once the progress that tells of them is written."""

    def __init__(self, folder: Path, index: int):
        self.path = lane_path(folder, index)
        self.progress = read_progress(folder, index)
        self._pending: list[Tensor] = []
        self._batches = 0
        if not self.progress.done:
            with open(self.path, "ab") as file:  # what was written after the last count is done again
                file.truncate(4 * self.progress.rows * self.progress.dimension)

    def write(self, features: Tensor | None) -> None:
        if features is not None:
            self._pending.append(features)
        self._batches += 1
        if self.progress.done or self._batches % _SAVE_EVERY == 0:
            self._save()

    def _save(self) -> None:
        if self._pending:
            rows = torch.cat(self._pending).cpu().numpy()
            with open(self.path, "ab") as file:
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())
            self.progress.rows += len(rows)
            self.progress.dimension = rows.shape[1]
            self._pending = []
        write_json(self.path.with_suffix(".json"), asdict(self.progress))


def _decoded(
    readings: Iterator[Callable[[], StoredImage]], batch_size: int, pool: ThreadPoolExecutor, decode: Decoder
) -> Iterator[list[Future]]:
    """Batches that threads are decoding, two of them ahead of the one that is wanted."""
    ahead: deque[list[Future]] = deque()
    while batch := list(islice(readings, batch_size)):
        ahead.append([pool.submit(_read_and_decode, reading, decode) for reading in batch])
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead


def _read_and_decode(reading: Callable[[], StoredImage], decode: Decoder) -> tuple[str, Tensor, str, str | None]:
    """Name, image, stored mode and prompt."""
    stored = reading()
    return (stored.name, *decode(stored), stored.prompt)


def _load(batch: list[Future], progress: LaneProgress, skip_corrupt: bool) -> list[Loaded]:
    """A batch, counted; an empty batch is the lane's end."""
    progress.done = not batch
    loaded = []
    for future in batch:
        progress.position += 1
        try:
            name, image, mode, prompt = future.result()
        except UnreadableImage as error:
            if not skip_corrupt:
                raise
            progress.skipped.append(str(error))
            continue
        progress.modes[mode] = progress.modes.get(mode, 0) + 1
        loaded.append((name, image, prompt))
    return loaded


def _first_size(
    source: ImageSource, batch_size: int, decode: Decoder, skip_corrupt: bool
) -> tuple[str, tuple[int, int]]:
    """Name and size of the first image that can be read, with which all others are compared."""
    for reading in chain_lanes(source, batch_size):
        try:
            name, image, *_ = _read_and_decode(reading, decode)
        except UnreadableImage:
            if not skip_corrupt:
                raise
            continue
        return name, (image.shape[1], image.shape[2])
    raise ValueError(f"{source.description['source']} holds no image that can be read.")


def _mixed_sizes(first: str, first_size: tuple, second: str, second_size: tuple, folder: Path) -> ValueError:
    shown = [f"{name} is {width} x {height}" for name, (height, width) in ((first, first_size), (second, second_size))]
    return ValueError(
        f"images are of several sizes: {shown[0]}, {shown[1]} pixels. Pass --resize N to crop the centre of each and "
        "resize it to N x N, as ImageNet is prepared, or resize them yourself."
        + (
            f" Remove {folder} first, which holds features made without."
            if any(folder.glob(_PROGRESS_PATTERN))
            else ""
        )
    )


def _extract(extractor: FeatureExtractor, loaded: list[Loaded], name: str, device: torch.device) -> Tensor:
    images, prompts = torch.stack([image for _, image, _ in loaded]).to(device), [prompt for *_, prompt in loaded]
    with torch.inference_mode():
        features = extract_features(extractor, images, prompts, name=name, check_finite=False, batch_size=len(images))
    bad = (~features.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        names = ", ".join(loaded[i][0] for i in bad[:3]) + (", …" if len(bad) > 3 else "")
        raise ValueError(
            f"feature extractor {name!r} gave NaN or infinite values for {len(bad)} images ({names}): run it in "
            "float32 and look at the images."
        )
    return features
