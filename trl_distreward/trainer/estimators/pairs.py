# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Batches of (image, time) pairs: selected images, dealt out to the processes and cut into micro-batches."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from ...sampling import send
from .base import MicroBatch, State


class Pairs(NamedTuple):
    """Pairs of an image and a time, in CPU memory: asking a GPU would wait for the last micro-batch."""

    image: Tensor  # (P,) among this process's images
    column: Tensor  # (P,) among the times of an image
    weights: Tensor  # (P,) that add up to 1 over all processes
    is_last: bool


def cut_pairs(num_own: int, num_images: int, num_times: int, size: int, processes: int) -> Iterator[Pairs]:
    """Cuts this process's pairs into micro-batches; where it has fewer than others, the last repeats at weight 0."""
    own, most = num_own * num_times, math.ceil(num_images / processes) * num_times
    for start in range(0, most, size):
        index = torch.arange(start, min(start + size, most))
        weights = torch.where(index < own, 1.0 / (num_images * num_times), 0.0)
        index = index.clamp(max=max(own - 1, 0))
        yield Pairs(index // num_times, index % num_times, weights, start + size >= most)


@dataclass
class StoredBatch:
    """Base class of batches that a checkpoint may hold."""

    def state_dict(self) -> State:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: State, device: torch.device, elsewhere: Mapping[str, str] | None = None) -> Self:
        """Rebuilds a saved batch on `device`; `elsewhere` names other devices of some of its fields."""
        moved = dict(state)
        for name, value in state.items():
            there = (elsewhere or {}).get(name, device)
            if isinstance(value, dict):
                moved[name] = {key: tensor.to(there) for key, tensor in value.items()}
            elif isinstance(value, Tensor):
                moved[name] = value.to(there)
        return cls(**moved)


@dataclass
class PairBatch(StoredBatch):
    """Images of one process, K of them, paired with each of the S trained steps of their trajectories."""

    cond: dict[str, Tensor]  # (K, ...) encoded conditions
    states: dict[int, Tensor]  # (K, ...) samples by grid index, at both ends of every step
    steps: list[int]
    grid: Tensor  # (T + 1,) times, float64
    log_probs: Tensor  # (K, S) as the rollout drew them
    advantages: Tensor  # (K,) float32
    step_weights: Tensor  # (S,) of mean 1
    num_own: int  # images that count; a process left without any holds one that does not
    num_images: int  # images that count, over all processes
    # anchor of the ratio (K, S) and means (K, S, ...), written during the first of several updates
    old_log_probs: Tensor | None = None
    old_means: Tensor | None = None
    anchored: bool = False  # whether the anchors are written

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        device, steps = self.advantages.device, torch.tensor(self.steps)
        for pairs in cut_pairs(self.num_own, self.num_images, len(steps), size, processes):
            image, column, step = pairs.image, pairs.column, steps[pairs.column]
            rows, columns = send(image, device), send(column, device)
            micro: MicroBatch = {
                "cond": {name: value[rows] for name, value in self.cond.items()},
                "x": _pick(self.states, image, step, device),
                "next_x": _pick(self.states, image, step + 1, device),
                "t": send(self.grid[step], device),
                "t_next": send(self.grid[step + 1], device),
                "advantages": self.advantages[rows],
                "weights": send(pairs.weights, device) * self.step_weights[columns],
                "log_probs": self.log_probs[rows, columns],
            }
            if self.old_log_probs is not None:
                if self.anchored:
                    micro["old_log_probs"] = self.old_log_probs[rows, columns]
                    if self.old_means is not None:
                        where = image.to(self.old_means.device), column.to(self.old_means.device)
                        micro["old_means"] = send(self.old_means[where], device)
                else:
                    micro["anchor"] = (self, image, column)
            yield micro, pairs.is_last
        self.anchored = self.old_log_probs is not None

    def anchor(self, image: Tensor, column: Tensor, log_prob: Tensor, mean: Tensor) -> None:
        """Writes the anchors of pairs: the log-probabilities and means that the first update computed for them."""
        assert self.old_log_probs is not None
        device = self.old_log_probs.device
        self.old_log_probs[send(image, device), send(column, device)] = log_prob.detach()
        if self.old_means is not None:
            device = self.old_means.device
            self.old_means[image.to(device), column.to(device)] = mean.detach().to(device)


class Deal:
    """Deals the selected images `kept` `(M,)` out evenly: the k-th goes to process k modulo their number."""

    def __init__(self, kept: Tensor, size: int, accelerator: Accelerator):
        self.gather, self.processes = accelerator.gather, accelerator.num_processes
        rank = accelerator.process_index
        dealt = torch.arange(len(kept), device=kept.device) % self.processes == rank
        self.num_own = int(dealt.sum())
        if self.num_own == 0:
            dealt[0] = True  # takes part in every collective, at weight 0
        self.mine = kept[dealt]
        owners = kept // size
        counts = torch.bincount(owners, minlength=self.processes)
        self.most = int(counts.max())
        self.own = kept[owners == rank] % size
        places = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[owners]
        self.sources = owners[dealt], places[dealt]

    def __call__(self, values: Tensor) -> Tensor:
        """Exchanges rows `(K, ...)` of this process for the rows `(num_own, ...)` that it is dealt."""
        mine = values[self.own.to(values.device)]
        if self.processes == 1:
            return mine
        padding = values.new_zeros(self.most - len(mine), *values.shape[1:])
        sent = torch.cat([mine, padding]).to(self.own.device)  # states may be in CPU memory
        everything = self.gather(sent).view(self.processes, self.most, *values.shape[1:])
        return everything[self.sources].to(values.device)


def _pick(states: dict[int, Tensor], image: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Rows `states[index[p]][image[p]]` for every pair p, on `device`; `image` and `index` are in CPU memory."""
    order, parts = index.argsort(stable=True), []
    for i in index.unique().tolist():
        rows = image[index == i]
        values = states[i]
        parts.append(send(values[send(rows, values.device)], device))
    return torch.cat(parts)[send(order.argsort(), device)]
