# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a set of merging coefficients is worth: the reward of the images that the merged model makes."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..conditions import take
from ..generation import image_generators, sample
from ..merging.pool import CheckpointPool
from ..policies import DiffusionPolicy, decode_uint8
from ..rewards.slots import SlotSampler, StratifiedSlotSampler
from ..rewards.subset_replace import SubsetReplaceReward
from .judged import Judged
from .reward_functions import RewardFunctions


class CandidateJudge:
    """
    Merges, generates and rewards, a share of the candidates in each process.

    All candidates of a step get the same noise, conditions and replaced slots: what their rewards differ by is the
    coefficients' doing.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        network (`nn.Module`): what is merged into, and generates.
        pool ([`~merging.CheckpointPool`]): checkpoints.
        groups (`dict[str, int]`): row of the coefficients for each tensor.
        rewards ([`RewardFunctions`]): what judges images.
        args ([`MergeCoefficientConfig`]): sizes, schedule and seed.
        conditions: one per image of a candidate's set.
        slots ([`SlotSampler`] or [`StratifiedSlotSampler`]): draws the subsets of it that are replaced.
        accelerator (`accelerate.Accelerator`): tells the processes.
        autocast (`Callable`): makes the context that the network runs under.
        trainer_state (`Callable`): returns the trainer's state of now, for reward functions.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        network: nn.Module,
        pool: CheckpointPool,
        groups: Mapping[str, int],
        rewards: RewardFunctions,
        args: Any,
        conditions: Any,
        slots: SlotSampler | StratifiedSlotSampler,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
        trainer_state: Callable[[], Any],
    ):
        self.policy, self.network, self.pool, self.groups = policy, network, pool, groups
        self.rewards, self.args, self.conditions, self.slots = rewards, args, conditions, slots
        self.accelerator, self.autocast, self.trainer_state = accelerator, autocast, trainer_state

    def merge(self, coefficients: Tensor) -> None:
        """Merges the pool with coefficients `(G, N_c)` into the network."""
        self.pool.merge_into(self.network, coefficients, self.groups)

    @torch.no_grad()
    def judge(self, coefficients: Tensor, step: int) -> Tensor:
        """
        Rewards `(B, functions)`, float64, of coefficients `(B, G, N_c)`; NaN where images or features are not finite.

        The same on every process, whatever their number.
        """
        mine = range(self.accelerator.process_index, len(coefficients), self.accelerator.num_processes)
        values = torch.zeros(len(coefficients), len(self.rewards.functions), dtype=torch.float64)
        for index in mine:
            values[index] = self.judge_one(coefficients[index], step)
        # every other process has zeros where this one has values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    @torch.no_grad()
    def judge_one(self, coefficients: Tensor, step: int) -> Tensor:
        """Rewards `(functions,)` of coefficients `(G, N_c)`, on this process alone."""
        values = self.judge_set(coefficients, self.conditions, "candidate", step)
        if self.args.num_replacements and bool(values.isfinite().all()):
            return self._judge_replaced(values, step)
        return values

    @torch.no_grad()
    def judge_set(self, coefficients: Tensor, conditions: Any, stream: str, step: int) -> Tensor:
        """Rewards `(functions,)` of one image per condition: minus the set's distance, or means over its images."""
        self.merge(coefficients)
        own, values = self._generate(conditions, stream, step)
        return values if own is None else self._with_distances(own, values)

    @torch.no_grad()
    def judge_start(self, coefficients: Tensor, conditions: Any) -> Tensor:
        """
        As `judge_set`, of what training starts at.

        Raises:
            ValueError: images, features or rewards are not finite.
        """
        self.merge(coefficients)
        own, values = self._generate(conditions, "start", 0)
        if own is None:
            raise ValueError(
                "the images of the initial coefficients, or their features, are not finite: choose other "
                "initial_coefficients."
            )
        values = self._with_distances(own, values)
        for name, value in zip(self.rewards.names, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"reward function {name!r} gives {value} for the images of the initial coefficients, which are "
                    "finite: it must return one finite float per image."
                )
        return values

    def _with_distances(self, own: list[dict[str, Tensor]], values: Tensor) -> Tensor:
        for reward, features in zip(self.rewards.distributional, own, strict=True):
            reward.set_reference(features)
        for index, function in enumerate(self.rewards.functions):
            if isinstance(function, SubsetReplaceReward):
                values[index] = function.baseline
        return values

    def _judge_replaced(self, values: Tensor, step: int) -> Tensor:
        """Eq. 10: the mean over N_s subsets of the set and N_r replacements of each."""
        args = self.args
        (generator,) = image_generators(args.seed, "subsets", self._noise_step(step), [0])
        self.slots.generator.manual_seed(generator.initial_seed())  # the same for all candidates of a step
        slots = self.slots.draw(args.num_subsets, args.replace_size).repeat_interleave(args.num_replacements, dim=0)
        new, _ = self._generate(take(self.conditions, slots.flatten()), "replacement", step, single=False)
        if new is None:
            return torch.full_like(values, torch.nan)
        rewards = iter(zip(self.rewards.distributional, new, strict=True))
        for index, function in enumerate(self.rewards.functions):
            if isinstance(function, SubsetReplaceReward):
                reward, features = next(rewards)
                values[index] = reward.subset_rewards(slots.to(self.accelerator.device), features).mean()
        return values

    def _noise_step(self, step: int) -> int:
        return step if self.args.fresh_noise else 0

    def _generate(
        self, conditions: Any, stream: str, step: int, single: bool = True
    ) -> tuple[list[dict[str, Tensor]] | None, Tensor]:
        """
        Features of new images, for each reward of sets, and the means of the rewards of `single` images; no features
        and NaN where images or features are not finite.
        """
        size, noise = self.args.per_device_eval_batch_size, self._noise_step(step)
        chunks: list[list[dict[str, Tensor]]] = []
        values = torch.zeros(len(self.rewards.functions), dtype=torch.float64)
        for start in range(0, len(conditions), size):
            indices = range(start, min(start + size, len(conditions)))
            batch = take(conditions, indices)
            generators = image_generators(self.args.seed, stream, noise, indices)
            with self.autocast():  # the network only: decoding and features stay in full precision
                x = sample(self.policy, self.network, batch, self.args.rollout_schedule, generators).sample
            images, finite = decode_uint8(self.policy, x, self.args.decode_batch_size)
            features = [r.extract(images, batch, check_finite=False) for r in self.rewards.distributional]
            if not Judged(features, finite).finite:
                return None, torch.full_like(values, torch.nan)
            chunks.append(features)
            if single:
                values += self._single(images, batch, indices) / len(conditions)
        joined = [
            {space: torch.cat([c[space] for c in parts]) for space in parts[0]} for parts in zip(*chunks, strict=True)
        ]
        return joined, values

    def _single(self, images: Tensor, conditions: Any, indices: range) -> Tensor:
        """Sums of the rewards of single images."""
        sums = torch.zeros(len(self.rewards.functions), dtype=torch.float64)
        for index, function in enumerate(self.rewards.functions):
            if isinstance(function, SubsetReplaceReward):
                continue
            slots = torch.tensor(indices, device=images.device)
            returned = function(images=images, conditions=conditions, slots=slots, trainer_state=self.trainer_state())
            scores = torch.as_tensor(returned, dtype=torch.float64)
            if scores.numel() != len(images):
                raise ValueError(
                    f"reward function {self.rewards.names[index]!r} returned {scores.numel()} values for "
                    f"{len(images)} images: it must return one float per image."
                )
            sums[index] = scores.sum()
        return sums
