# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Gradient-free searches for merging coefficients.

`ask()` gives candidates `(B, G, N_c)`, float64 and the same on every process; `tell(rewards)` takes their finite
rewards `(B,)`; `mean` is the choice so far. Each step has its own noise, so only rewards of one step are compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .posthoc import LARGEST_SIGMA_REL, posthoc_ema_coefficients, power_profile_coefficients


def power_profile_grid(times: Sequence[float], count: int, stds: Sequence[float] | None = None) -> Tensor:
    """Coefficients `(count, N_c)` of averages with evenly spaced widths; raw checkpoints have no `stds`."""
    widths = [LARGEST_SIGMA_REL * (i + 1) / count for i in range(count)]
    if stds is None:
        return torch.stack([power_profile_coefficients(times, width) for width in widths])
    return torch.stack([posthoc_ema_coefficients(times, stds, max(times), width) for width in widths])


class GridSearch:
    """Judges the same points `(B, G, N_c)` at every step, and chooses the one with the best mean reward."""

    def __init__(self, points: Tensor):
        self.points = points
        self.totals = torch.zeros(len(points), dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.points[self.totals.argmax()]

    def ask(self) -> Tensor:
        return self.points

    def tell(self, rewards: Tensor) -> None:
        self.totals += rewards

    def state_dict(self) -> dict[str, Tensor]:
        return {"points": self.points, "totals": self.totals}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not torch.equal(state["points"], self.points):
            remedy = "resume with its num_generations, checkpoint_times and checkpoint_stds"
            raise ValueError(f"the checkpoint's grid is not this run's: {remedy}.")
        self.totals = state["totals"].clone()


class CMASearch:
    """CMA-ES by the `cma` package, from the first mean `(G, N_c)` and `std`. Loading repeats the search."""

    def __init__(self, initial: Tensor, std: float, count: int, seed: int = 0):
        self.initial, self.std, self.count, self.seed = initial.double(), std, count, seed
        self._start()

    def _start(self) -> None:
        import cma  # takes a second, and few runs need it

        generator = np.random.default_rng(self.seed)
        options = {
            "popsize": self.count,
            "randn": lambda *size: generator.standard_normal(size),
            "seed": float("nan"),  # leaves numpy's global generator alone
            "verbose": -9,
        }
        self._evolution = cma.CMAEvolutionStrategy(self.initial.flatten().tolist(), self.std, options)
        self._asked: list[Any] = []
        self._samples: list[Tensor] = []
        self._rewards: list[Tensor] = []

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(np.asarray(self._evolution.mean)).view_as(self.initial).clone()

    def ask(self) -> Tensor:
        self._asked = self._evolution.ask(self.count)
        self._samples.append(torch.as_tensor(np.stack(self._asked)).view(self.count, *self.initial.shape))
        self._rewards.append(torch.full((self.count,), torch.nan, dtype=torch.float64))
        return self._samples[-1].clone()

    def tell(self, rewards: Tensor) -> None:
        self._evolution.tell(self._asked, (-rewards).tolist())
        self._rewards[-1] = rewards.double()

    def state_dict(self) -> dict[str, Tensor]:
        if not self._samples:
            return {}
        return {"samples": torch.stack(self._samples), "rewards": torch.stack(self._rewards)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._start()
        for samples, rewards in zip(state.get("samples", ()), state.get("rewards", ()), strict=True):
            if len(samples) != self.count or not torch.equal(self.ask(), samples):
                kept = f"num_generations={len(samples)}, and its sampling_std, seed, and versions of cma and numpy"
                raise ValueError(f"the search does not repeat itself: resume with {kept}.")
            if bool(rewards.isfinite().all()):
                self.tell(rewards)


Search = GridSearch | CMASearch
