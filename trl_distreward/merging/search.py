# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Searches for merging coefficients that need no gradient: what a learnt policy has to beat at equal images.

Each is asked for candidates, `(B, G, N_c)` float64, the same on every process, and told their rewards. All candidates
of a step are judged from the same noise, another one at every step: only rewards of one step are compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .coefficients import gaussian_samples
from .posthoc import LARGEST_SIGMA_REL, posthoc_ema_coefficients, power_profile_coefficients


class Search(Protocol):
    """What the trainer needs of a search."""

    @property
    def mean(self) -> Tensor:
        """Its choice so far, `(G, N_c)`."""
        ...

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        """Candidates `(count, G, N_c)`; `generator` is another one at every step."""
        ...

    def tell(self, samples: Tensor, rewards: Tensor) -> None:
        """Takes the finite rewards `(count,)` of what was asked last."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def power_profile_grid(times: Sequence[float], count: int, stds: Sequence[float] | None = None) -> Tensor:
    """
    Coefficients `(count, N_c)` of power-function averages, their widths evenly spaced up to the uniform average.

    Of checkpoints with relative widths `stds`, which are averages themselves, the nearest combinations are taken.
    """
    widths = [LARGEST_SIGMA_REL * (i + 1) / count for i in range(count)]
    if stds is None:
        return torch.stack([power_profile_coefficients(times, width) for width in widths])
    return torch.stack([posthoc_ema_coefficients(times, stds, max(times), width) for width in widths])


class GridSearch:
    """
    Judges the same points at every step, and chooses by their mean reward.

    Args:
        points (`torch.Tensor` of shape `(B, G, N_c)`): samples to judge.
    """

    def __init__(self, points: Tensor):
        self.points = points
        self.totals = torch.zeros(len(points), dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.points[self.totals.argmax()]

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        return self.points

    def tell(self, samples: Tensor, rewards: Tensor) -> None:
        self.totals += rewards

    def state_dict(self) -> dict[str, Tensor]:
        return {"points": self.points, "totals": self.totals}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not torch.equal(state["points"], self.points):
            raise ValueError(
                f"the grid is not that of the checkpoint, {len(state['points'])} points, now {len(self.points)}: "
                "resume with the num_generations, checkpoint_times and checkpoint_stds that the run was started with."
            )
        self.totals = state["totals"].clone()


class RandomSearch:
    """
    Draws about the start; the best so far is judged again beside the new ones, and gives way to what beats it there.

    Args:
        initial (`torch.Tensor` of shape `(G, N_c)`): mean of the draws.
        std (`float`): their standard deviation.
    """

    def __init__(self, initial: Tensor, std: float):
        self.initial, self.std = initial, std
        self.mean = initial.clone()

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.cat([self.mean[None], gaussian_samples(self.initial, self.std, count - 1, generator)])

    def tell(self, samples: Tensor, rewards: Tensor) -> None:
        self.mean = samples[rewards.argmax()].clone()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mean = state["mean"].clone()


class CMASearch:
    """
    CMA-ES of the [`cma`](https://github.com/CMA-ES/pycma) package, which `pip install "trl-distreward[merging]"` has.

    Its state is what it answered and was told: a search that is loaded does all of it again, and nothing needs to be
    pickled. What was asked and never told, as a step without finite images is, has NaN for rewards.

    Args:
        initial (`torch.Tensor` of shape `(G, N_c)`): its first mean.
        std (`float`): its first standard deviation.
        count (`int`): candidates per step.
        seed (`int`, *optional*, defaults to 0): of its own generator; numpy's global one is left alone.
    """

    def __init__(self, initial: Tensor, std: float, count: int, seed: int = 0):
        self.initial, self.std, self.count, self.seed = initial.double(), std, count, seed
        self._start()

    def _start(self) -> None:
        try:
            import cma
        except ImportError as error:
            raise ImportError(
                "method='cma' needs the cma package: pip install 'trl-distreward[merging]', or choose another method."
            ) from error
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

    def ask(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        self._asked = self._evolution.ask(count)
        self._samples.append(torch.as_tensor(np.stack(self._asked)).view(count, *self.initial.shape))
        self._rewards.append(torch.full((count,), torch.nan, dtype=torch.float64))
        return self._samples[-1].clone()

    def tell(self, samples: Tensor, rewards: Tensor) -> None:
        self._evolution.tell(self._asked, (-rewards).tolist())
        self._rewards[-1] = rewards.double()

    def state_dict(self) -> dict[str, Tensor]:
        if not self._samples:
            return {}
        return {"samples": torch.stack(self._samples), "rewards": torch.stack(self._rewards)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._start()
        for samples, rewards in zip(state.get("samples", ()), state.get("rewards", ()), strict=True):
            if len(samples) != self.count or not torch.equal(self.ask(len(samples)), samples):
                raise ValueError(
                    f"the search does not repeat itself: resume with the versions of cma and numpy, the "
                    f"num_generations ({len(samples)}, now {self.count}), sampling_std and seed that the run was "
                    "started with."
                )
            if bool(rewards.isfinite().all()):
                self.tell(samples, rewards)
