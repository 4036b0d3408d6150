# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Trajectories between generation and update: dealt out to the processes, cut into micro-batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..sampling import send


@dataclass
class RolloutBatch:
    """
    Trajectories of one process, from which updates are made.

    Attributes:
        cond (`dict[str, torch.Tensor]` of shapes `(K, ...)`): encoded conditions.
        states (`dict[int, torch.Tensor]` of shape `(K, ...)`): samples at grid index `i`, at both ends of every step.
        steps (`tuple[int, ...]`): trained steps.
        drawn_log_probs (`torch.Tensor` of shape `(K, len(steps))`): as the rollout computed them.
        advantages (`torch.Tensor` of shape `(K,)`, float32).
        num_own (`int`): trajectories that count; a process left without any holds one that does not.
        num_images (`int`): trajectories that count over all processes; 0 if there is nothing to learn from.
        old_log_probs (`torch.Tensor` of shape `(K, len(steps))` or `None`):
            anchor of the ratio; `None` on-policy, where the current log-probability is its own anchor.
        old_means (`dict[int, torch.Tensor]` of shape `(K, ...)` or `None`): the steps' means then, if needed.
        times (`torch.Tensor` of shape `(K,)` or `None`): times to use instead of the grid's, for flow matching.
        finite (`bool`): whether all samples are.
    """

    cond: dict[str, Tensor]
    states: dict[int, Tensor]
    steps: tuple[int, ...]
    drawn_log_probs: Tensor
    advantages: Tensor
    num_own: int
    num_images: int
    old_log_probs: Tensor | None = None
    old_means: dict[int, Tensor] | None = None
    times: Tensor | None = None
    finite: bool = True

    def to(self, device: torch.device, move_states: bool = True) -> "RolloutBatch":
        """On another device, states and means only if asked."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
            elif isinstance(value, dict) and (field.name == "cond" or move_states):
                moved[field.name] = {key: tensor.to(device) for key, tensor in value.items()}
        return replace(self, **moved)

    def deal(self, kept: Tensor, advantages: Tensor, gather: Callable[[Tensor], Tensor], rank: int, processes: int):
        """
        The kept trajectories, dealt out evenly: the k-th goes to process k modulo `processes`.

        Args:
            kept (`torch.LongTensor` of shape `(M,)`): kept images, ascending, where image `i` of all processes is
                image `i mod K` of process `i div K`.
            advantages (`torch.Tensor` of shape `(processes · K,)`): of all images.
            gather (`Callable`): concatenates a tensor's rows over processes.
            rank, processes (`int`): this process and how many there are.

        Returns:
            [`RolloutBatch`]
        """
        dealt = torch.arange(len(kept), device=kept.device) % processes == rank
        num_own = int(dealt.sum())
        if num_own == 0:
            dealt[0] = True  # takes part in every collective, at weight 0
        size = len(self.advantages)
        owners = kept // size
        counts = torch.bincount(owners, minlength=processes)
        most = int(counts.max())
        own = kept[owners == rank] % size
        rows = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[owners]  # place at its owner

        def exchange(values: Tensor) -> Tensor:
            mine = values[own.to(values.device)]
            if processes == 1:
                return mine
            padding = values.new_zeros(most - len(mine), *values.shape[1:])
            sent = torch.cat([mine, padding]).to(kept.device)  # states may wait in CPU memory
            everything = gather(sent).view(processes, most, *values.shape[1:])
            return everything[owners[dealt], rows[dealt]].to(values.device)

        return replace(
            self,
            cond={name: exchange(value) for name, value in self.cond.items()},
            states={i: exchange(value) for i, value in self.states.items()},
            drawn_log_probs=exchange(self.drawn_log_probs),
            times=None if self.times is None else exchange(self.times),
            advantages=advantages[kept[dealt]].float(),
            num_own=num_own,
            num_images=len(kept),
        )

    def micro_batches(
        self, times: Sequence[float], size: int, processes: int, step_weights: Tensor | None = None
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """
        Cuts the (image, step) pairs into micro-batches of at most `size`, as many on every process.

        Where a process has fewer pairs, its last one is repeated at weight 0. Weights add up to 1 over all processes.

        Args:
            times (`Sequence[float]`): time grid.
            size (`int`): most pairs of a micro-batch.
            processes (`int`): number of processes.
            step_weights (`torch.Tensor` of shape `(len(steps),)`, *optional*): of mean 1; all 1 by default.

        Yields:
            the micro-batch's tensors `(P, ...)`, and whether it is the last.
        """
        device, steps = self.advantages.device, torch.tensor(self.steps)
        grid = torch.tensor(times, dtype=torch.float64)
        pairs = self.num_own * len(steps)
        most = math.ceil(self.num_images / processes) * len(steps)
        weight = 1.0 / (self.num_images * len(steps))
        for start in range(0, most, size):
            # which pairs these are is known to the host: it never asks the device, which is busy with the last ones
            index = torch.arange(start, min(start + size, most))
            weights = torch.where(index < pairs, weight, 0.0)
            index = index.clamp(max=max(pairs - 1, 0))
            image, column = index // len(steps), index % len(steps)
            step = steps[column]
            rows, columns = send(image, device), send(column, device)
            weights = send(weights, device)
            if step_weights is not None:
                weights = weights * step_weights[columns]
            micro = {
                "cond": {name: value[rows] for name, value in self.cond.items()},
                "x": _pick(self.states, image, step, device),
                "next_x": _pick(self.states, image, step + 1, device),
                "t": send(grid[step], device) if self.times is None else self.times[rows],
                "t_next": send(grid[step + 1], device),
                "step": send(step, device),
                "advantages": self.advantages[rows],
                "weights": weights,
                "drawn_log_probs": self.drawn_log_probs[rows, columns],
            }
            if self.old_log_probs is not None:
                micro["old_log_probs"] = self.old_log_probs[rows, columns]
            if self.old_means is not None:
                micro["old_means"] = _pick(self.old_means, image, step, device)
            yield micro, start + size >= most


def _pick(states: dict[int, Tensor], image: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Rows `states[index[p]][image[p]]` for every pair p, on `device`; `image` and `index` are in CPU memory."""
    order, parts = index.argsort(stable=True), []
    for i in index.unique().tolist():
        rows = image[index == i]
        values = states[i]
        parts.append(send(values[send(rows, values.device)], device))
    return torch.cat(parts)[send(order.argsort(), device)]
