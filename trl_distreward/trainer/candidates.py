# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Judging merging coefficients by the images that the merged model generates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conditions import Conditions, take
from ..merging.coefficients import samples_of
from ..merging.search import CMASearch, GridSearch, Search, power_profile_grid
from ..seeds import keyed_generator
from .image_sets import decode_and_extract, generate_for, progress_bar
from .reward_functions import Features, joined
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from .merge_coefficient_config import MergeCoefficientConfig
    from .merge_coefficient_trainer import MergeCoefficientTrainer


class CandidateJudge:
    """Merges, generates and rewards: all candidates of a step get the same noise, conditions and slots."""

    def __init__(self, trainer: "MergeCoefficientTrainer"):
        self.trainer, self.args, self.rewards = trainer, trainer.args, trainer.rewards
        self.network, self.accelerator = trainer.merged_network, trainer.accelerator
        self.batch_size = trainer.eval_batch_size  # now: later a process may have no candidate to judge

    def merge(self, coefficients: Tensor) -> None:
        """Merges the pool with coefficients `(G, N_c)` into the network."""
        self.trainer.pool.merge_into(self.network, coefficients, self.trainer.groups)

    @torch.no_grad()
    def judge(self, coefficients: Tensor, step: int) -> Tensor:
        """Rewards `(B, functions)` of coefficients `(B, G, N_c)`, float64, on every process; NaN if not finite."""
        values = torch.zeros(len(coefficients), len(self.rewards.all), dtype=torch.float64)
        processes = self.accelerator.num_processes
        with progress_bar(self.trainer, len(coefficients), "Candidates", "candidate") as bar:
            for first in range(0, len(coefficients), processes):
                stop_if_asked(self.trainer)
                index = first + self.accelerator.process_index
                if index < len(coefficients):
                    judged = self.judge_set(coefficients[index], self.trainer.conditions, "candidate", step)
                    replaced = self.args.num_replacements and bool(judged.isfinite().all())
                    values[index] = self._judge_replaced(judged, step) if replaced else judged
                bar.update(processes)
        self.rewards.record_metrics(self.trainer)
        # every other process has zeros where this one has values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    @torch.no_grad()
    def judge_set(self, coefficients: Tensor, conditions: Conditions, stream: str, step: int) -> Tensor:
        """Rewards `(functions,)` of a set with one image per condition: minus its distance, or its mean."""
        self.merge(coefficients)
        features, values = self._generate(conditions, stream, step)
        for place, reward in enumerate(self.rewards.all):
            if reward.of_sets and features is not None:
                reward.function.set_reference(features[reward.index])
                values[place] = reward.function.baseline
        return values

    def _judge_replaced(self, values: Tensor, step: int) -> Tensor:
        """Averages over N_s subsets of the set and N_r replacements of each (Eq. 10)."""
        args, sampler = self.args, self.trainer.slot_sampler
        # the same for all candidates of a step
        sampler.generator.set_state(keyed_generator(args.seed, "subsets", step).get_state())
        slots = sampler.draw(args.num_subsets, args.replace_size).repeat_interleave(args.num_replacements, dim=0)
        features, _ = self._generate(take(self.trainer.conditions, slots.flatten()), "replacement", step)
        if features is None:
            return torch.full_like(values, torch.nan)
        for place, reward in enumerate(self.rewards.all):
            if reward.of_sets:
                there = slots.to(self.accelerator.device)
                values[place] = reward.function.subset_rewards(there, features[reward.index]).mean()
        return values

    def _generate(self, conditions: Conditions, stream: str, step: int) -> tuple[list[Features] | None, Tensor]:
        """Features of new images per distribution reward, `None` if not finite; mean rewards of single images."""
        trainer, args = self.trainer, self.args
        values = torch.zeros(len(self.rewards.all), dtype=torch.float64)
        chunks: list[list[Features]] = []
        scores: list[Tensor] = []
        noise, size = (args.seed, stream, step), self.batch_size
        for batch in generate_for(trainer, self.network, conditions, args.rollout_schedule, noise, batch_size=size):
            if self.accelerator.num_processes == 1:  # others may be at another candidate, or at none
                stop_if_asked(trainer)
            features, finite, images = decode_and_extract(trainer, batch.sample, batch.conditions)
            if not finite.all():
                return None, torch.full_like(values, torch.nan)
            chunks.append(features)
            slots = torch.tensor(batch.indices, device=finite.device)
            if images is not None and stream == "candidate":
                scores.append(self.rewards.score_images(images, batch.conditions, slots, trainer.state))
        if scores:
            values[[not reward.of_sets for reward in self.rewards.all]] = torch.cat(scores, 1).nanmean(1).cpu()
        return joined(torch.cat, chunks), values


def build_search(args: "MergeCoefficientConfig", start: Tensor, times: Sequence[float]) -> Search | None:
    """Builds the gradient-free search that `args.method` names, from coefficients `(G, N_c)`; `None` for EMANet."""
    if args.method == "cma":
        return CMASearch(samples_of(start, args.coefficient_map), args.sampling_std, args.num_generations, args.seed)
    if args.method == "grid":
        profiles = power_profile_grid(times, args.num_generations, args.checkpoint_stds)
        return GridSearch(samples_of(profiles[:, None].expand(-1, len(start), -1), args.coefficient_map))
    return None
