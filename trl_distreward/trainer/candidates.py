# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Judging merging coefficients by the images that the merged model generates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..conditions import take
from ..generation import generate, image_generators
from ..merging.coefficients import samples_of
from ..merging.search import CMASearch, GridSearch, Search, power_profile_grid
from ..policies import decode_uint8
from ..rewards.slots import SlotSampler, StratifiedSlotSampler
from .reward_functions import call_per_image

if TYPE_CHECKING:
    from .merge_coefficient_config import MergeCoefficientConfig
    from .merge_coefficient_trainer import MergeCoefficientTrainer


class CandidateJudge:
    """
    Merges, generates and rewards; each process takes a share of the candidates.

    All candidates of a step get the same noise, conditions and replaced slots, so their rewards differ by the
    coefficients alone.
    """

    def __init__(self, trainer: "MergeCoefficientTrainer", slots: SlotSampler | StratifiedSlotSampler):
        self.trainer, self.slots = trainer, slots
        self.policy, self.network, self.args = trainer.policy, trainer.merged_network, trainer.args
        self.rewards, self.accelerator, self.conditions = trainer.rewards, trainer.accelerator, trainer.conditions

    def merge(self, coefficients: Tensor) -> None:
        """Merges the pool with coefficients `(G, N_c)` into the network."""
        self.trainer.pool.merge_into(self.network, coefficients, self.trainer.groups)

    @torch.no_grad()
    def judge(self, coefficients: Tensor, step: int) -> Tensor:
        """
        Computes rewards `(B, functions)` of coefficients `(B, G, N_c)`; float64 and the same on every process. They
        are NaN where images or features are not finite.
        """
        mine = range(self.accelerator.process_index, len(coefficients), self.accelerator.num_processes)
        values = torch.zeros(len(coefficients), len(self.rewards.all), dtype=torch.float64)
        for index in mine:
            values[index] = self.judge_set(coefficients[index], self.conditions, "candidate", step)
            if self.args.num_replacements and bool(values[index].isfinite().all()):
                values[index] = self._judge_replaced(values[index], step)
        # every other process has zeros where this one has values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    @torch.no_grad()
    def judge_set(self, coefficients: Tensor, conditions: Any, stream: str, step: int) -> Tensor:
        """Computes rewards `(functions,)` of a set with one image per condition: minus its distance, or its mean."""
        self.merge(coefficients)
        features, values = self._generate(conditions, stream, step)
        if features is None:
            return values
        for place, reward in enumerate(self.rewards.all):
            if reward.of_sets:
                reward.function.set_reference(features[reward.index])
                values[place] = reward.function.baseline
        return values

    def _judge_replaced(self, values: Tensor, step: int) -> Tensor:
        """Averages over N_s subsets of the set and N_r replacements of each (Eq. 10)."""
        args = self.args
        (generator,) = image_generators(args.seed, "subsets", self._noise_step(step), [0])
        self.slots.generator.manual_seed(generator.initial_seed())  # the same for all candidates of a step
        slots = self.slots.draw(args.num_subsets, args.replace_size).repeat_interleave(args.num_replacements, dim=0)
        features, _ = self._generate(take(self.conditions, slots.flatten()), "replacement", step, single=False)
        if features is None:
            return torch.full_like(values, torch.nan)
        for place, reward in enumerate(self.rewards.all):
            if reward.of_sets:
                there = slots.to(self.accelerator.device)
                values[place] = reward.function.subset_rewards(there, features[reward.index]).mean()
        return values

    def _noise_step(self, step: int) -> int:
        return step if self.args.fresh_noise else 0

    def _generate(
        self, conditions: Any, stream: str, step: int, single: bool = True
    ) -> tuple[list[dict[str, Tensor]] | None, Tensor]:
        """
        Features of new images per distribution reward, and means of the rewards of `single` images; no features and
        NaN if images or features are not finite.
        """
        values = torch.zeros(len(self.rewards.all), dtype=torch.float64)
        chunks: list[list[dict[str, Tensor]]] = []
        for batch in generate(
            self.policy,
            conditions,
            self.args.rollout_schedule,
            seed=self.args.seed,
            stream=stream,
            step=self._noise_step(step),
            batch_size=self.args.per_device_eval_batch_size,
            model=self.network,
            autocast=self.trainer.autocast,
        ):
            images, finite = decode_uint8(self.policy, batch.sample, self.args.decode_batch_size)
            features = [r.extract(images, batch.conditions, check_finite=False) for r in self.rewards.of_sets]
            flags = [finite, *(rows.isfinite().all(dim=1) for spaces in features for rows in spaces.values())]
            if not all(bool(flag.all()) for flag in flags):
                return None, torch.full_like(values, torch.nan)
            chunks.append(features)
            for place, reward in enumerate(self.rewards.all):
                if single and not reward.of_sets:
                    scores = call_per_image(
                        reward,
                        images=images,
                        conditions=batch.conditions,
                        slots=torch.tensor(batch.indices, device=images.device),
                        trainer_state=self.trainer.state,
                    )
                    values[place] += scores.sum().cpu() / len(conditions)
        joined = [
            {space: torch.cat([c[space] for c in parts]) for space in parts[0]} for parts in zip(*chunks, strict=True)
        ]
        return joined, values


def build_search(args: "MergeCoefficientConfig", start: Tensor, times: Sequence[float]) -> Search | None:
    """Builds the gradient-free search that `args.method` names, from coefficients `(G, N_c)`; `None` for EMANet."""
    if args.method == "cma":
        return CMASearch(samples_of(start, args.coefficient_map), args.sampling_std, args.num_generations, args.seed)
    if args.method == "grid":
        profiles = power_profile_grid(times, args.num_generations, args.checkpoint_stds)
        return GridSearch(samples_of(profiles[:, None].expand(-1, len(start), -1), args.coefficient_map))
    return None
