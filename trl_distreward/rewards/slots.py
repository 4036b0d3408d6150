# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Samplers of slots: the places of the reference set that new images are judged in."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..conditions import members_of, proportional_subsets
from ..files import State
from ..seeds import keyed_generator


class SlotSampler:
    """Draws slots of a reference set of `num_slots` from its own generator, whose state is saved with checkpoints."""

    def __init__(self, num_slots: int, seed: int = 0):
        self.num_slots = num_slots
        self.generator = keyed_generator(seed, "slots")
        self._pending = torch.empty(0, dtype=torch.long)  # rest of the current round, for `distinct`
        self._samplers = [self]  # one for each stratum

    def draw(self, num_subsets: int, replace_size: int, distinct: bool = False) -> Tensor:
        """Draws `(num_subsets, replace_size)` slots; with `distinct` none comes twice before all have come once."""
        check_size(replace_size, self.num_slots)
        return torch.stack(self.subsets([replace_size] * num_subsets, distinct))

    def subsets(self, sizes: Sequence[int], distinct: bool) -> list[Tensor]:
        """Draws subsets of `sizes`, each at most `num_slots`."""
        if not distinct:
            return [self._permutation()[:size] for size in sizes]
        seen = torch.empty(0, dtype=torch.long)
        subsets = []
        for size in sizes:
            # distinct over the whole draw while that is possible, then at least within the subset
            avoid = seen if len(seen) + size <= self.num_slots else seen[:0]
            subsets.append(self._next_of_round(size, avoid))
            seen = torch.cat([seen, subsets[-1]])
        return subsets

    def _permutation(self) -> Tensor:
        return torch.randperm(self.num_slots, generator=self.generator)

    def _next_of_round(self, count: int, avoid: Tensor) -> Tensor:
        taken, self._pending = self._pending[:count], self._pending[count:]
        if len(taken) < count:  # a new round; slots to avoid now come last in it
            order = self._permutation()
            repeated = torch.isin(order, torch.cat([avoid, taken]))
            fresh, missing = order[~repeated], count - len(taken)
            self._pending = torch.cat([fresh[missing:], order[repeated]])
            taken = torch.cat([taken, fresh[:missing]])
        return taken

    def state_dict(self) -> State:
        pending = [sampler._pending.clone() for sampler in self._samplers]
        return {"generator": self.generator.get_state(), "pending": pending}

    def load_state_dict(self, state: State) -> None:
        pending = state["pending"]
        if len(pending) != len(self._samplers):
            raise ValueError("the checkpoint's slots have other strata: resume with the same stratify_by and dataset.")
        self.generator.set_state(state["generator"])
        for sampler, rest in zip(self._samplers, pending, strict=True):
            sampler._pending = rest.clone()


class StratifiedSlotSampler(SlotSampler):
    """Draws subsets that hold the `strata`, one for each slot, in proportion, rounded up or down at random."""

    def __init__(self, strata: Sequence[Hashable], seed: int = 0):
        super().__init__(len(strata), seed)
        self.members = members_of(strata)
        self._samplers = [SlotSampler(len(places)) for places in self.members]
        for sampler in self._samplers:
            sampler.generator = self.generator

    def draw(self, num_subsets: int, replace_size: int, distinct: bool = False) -> Tensor:
        """Draws like [`SlotSampler.draw`]; with `distinct`, each stratum has rounds of its own."""
        check_size(replace_size, self.num_slots)
        sizes = torch.tensor([len(places) for places in self.members])
        counts = proportional_subsets(sizes, num_subsets, replace_size, self.generator)
        drawn = [
            [places[rows] for rows in sampler.subsets(wanted, distinct)]
            for sampler, places, wanted in zip(self._samplers, self.members, counts.T.tolist(), strict=True)
        ]
        subsets = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        # shuffled, so that the first images of a subset are not all from the first strata
        return torch.stack([s[torch.randperm(replace_size, generator=self.generator)] for s in subsets])


def check_size(replace_size: int, num_slots: int) -> None:
    """Raises `ValueError` if a subset is not smaller than the reference set."""
    if replace_size >= num_slots:
        raise ValueError(f"replace_size={replace_size} is not smaller than reference_set_size={num_slots}: lower it.")
