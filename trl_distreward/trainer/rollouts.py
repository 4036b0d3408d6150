# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""New images for slots of the reference set, each process a share, with the states that will be trained on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..conditions import take
from ..generation import SamplingSchedule, image_generators, sample
from ..policies import DiffusionPolicy
from ..rewards.subset_replace import SubsetReplaceReward
from ..sampling import send
from .judged import Judge, Judged
from .reward_functions import RewardFunctions
from .rollout_batch import RolloutBatch


class Rollouts:
    """
    Generates without state of its own: what comes follows from the weights, the slots and the step.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        args ([`DiffusionDistributionConfig`]): schedule, window, share of steps, seed, batch sizes.
        conditions: one per slot.
        rewards ([`RewardFunctions`]): what judges the images.
        accelerator (`accelerate.Accelerator`): tells the processes.
        autocast (`Callable`): makes the context that the network runs under in training.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        args: Any,
        conditions: Any,
        rewards: RewardFunctions,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.policy = policy
        self.args = args
        self.conditions = conditions
        self.rewards = rewards
        self.judge = Judge(policy, rewards, args.decode_batch_size, accelerator.device, rewards.need_images)
        self.accelerator = accelerator
        self.autocast = autocast

    def schedule(self, step: int) -> SamplingSchedule:
        """The schedule with the window of noise of the generation at optimizer step `step`."""
        schedule, size = self.args.rollout_schedule, self.args.sde_window_size
        if size is None:
            return schedule
        steps = schedule.trainable_steps
        places = len(steps) - size + 1
        if self.args.sde_window == "random":
            (generator,) = image_generators(self.args.seed, "window", step, [0])
            first = int(torch.randint(places, (1,), generator=generator))
        else:
            generation = step // self.args.num_iterations
            first = generation // self.args.sde_window_interval % places
        return replace(schedule, sde_steps=steps[first : first + size])

    def trained_steps(self, schedule: SamplingSchedule, step: int) -> tuple[int, ...]:
        """The share of the steps with noise that this generation trains."""
        steps = schedule.trainable_steps
        if self.args.timestep_fraction == 1.0:
            return steps
        (generator,) = image_generators(self.args.seed, "steps", step, [0])
        count = max(1, round(self.args.timestep_fraction * len(steps)))
        return tuple(sorted(steps[int(i)] for i in torch.randperm(len(steps), generator=generator)[:count]))

    def generate(self, model: nn.Module, slots: Tensor, step: int) -> tuple[RolloutBatch, Judged]:
        """
        Args:
            model (`nn.Module`): the network as it trains, wrapped.
            slots (`torch.LongTensor` of shape `(B, n)`): places to generate for, the same on every process.
            step (`int`): optimizer step, which noise, windows and shares of steps follow from.

        Returns:
            this process's `B n / processes` trajectories, and what the rewards need of their images.
        """
        candidates = [
            self.generate_once(model, slots, step, first_index=candidate * slots.numel())
            for candidate in range(self.args.best_of_n)
        ]
        if len(candidates) == 1:
            return candidates[0]
        # Appendix C: of a slot's candidates stays the one whose replaced distance is best by itself.
        local_slots = self.local(slots).view(-1, 1)
        scores = [self._scores(local_slots, judged) for _, judged in candidates]
        best = torch.stack(scores).argmax(dim=0)
        batches = [batch for batch, _ in candidates]
        rows = torch.arange(len(best), device=best.device)

        def pick(values: list[Tensor]) -> Tensor:
            device = values[0].device
            return torch.stack(values)[best.to(device), rows.to(device)]

        batch = replace(
            batches[0],
            states={i: pick([b.states[i] for b in batches]) for i in batches[0].states},
            drawn_log_probs=pick([b.drawn_log_probs for b in batches]),
            finite=all(b.finite for b in batches),
            times=None if batches[0].times is None else pick([b.times for b in batches if b.times is not None]),
        )
        return batch, Judged.pick([judged for _, judged in candidates], best)

    def _scores(self, slots: Tensor, judged: Judged) -> Tensor:
        """Of single images in `slots` `(K, 1)`, by the rewards of sets: `(K,)`, float64."""
        total, known = torch.zeros(len(slots), dtype=torch.float64, device=slots.device), iter(judged.features)
        for function, weight in zip(self.rewards.functions, self.rewards.weights, strict=True):
            if not isinstance(function, SubsetReplaceReward):
                continue
            spaces = next(known)
            flags = [judged.decoded, *(values.isfinite().all(dim=1) for values in spaces.values())]
            finite = torch.stack(flags).all(dim=0)
            filled = {space: torch.where(finite[:, None], values, 0.0) for space, values in spaces.items()}
            total += torch.where(finite, weight * function.subset_rewards(slots, filled), -torch.inf)
        return total

    def local(self, values: Tensor) -> Tensor:
        """This process's contiguous share of a flattened tensor."""
        share = values.numel() // self.accelerator.num_processes
        return values.flatten()[self.accelerator.process_index * share :][:share]

    def generate_once(
        self, model: nn.Module, slots: Tensor, step: int, first_index: int = 0
    ) -> tuple[RolloutBatch, Judged]:
        """One image per slot; `first_index` is the image index of the first, which its noise follows from."""
        schedule = self.schedule(step)
        args, mine = self.args, self.local(slots)
        places = mine.cpu()  # once: reading waits for all that is queued
        offset = first_index + self.accelerator.process_index * len(mine)
        size = args.rollout_batch_size or args.per_device_train_batch_size
        rejection = args.loss_type == "rft"
        steps = () if rejection else self.trained_steps(schedule, step)
        states: list[dict[int, Tensor]] = []
        log_probs, finite, judged, conds = [], [], [], []
        for chunk in torch.arange(len(mine)).split(size):
            conditions = take(self.conditions, places[chunk])
            generators = self._generators("rollout", step, chunk + offset)
            with self.autocast():  # the network only: decoding and features stay in full precision
                trajectory = sample(self.policy, model, conditions, schedule, generators, steps)
            judged.append(self.judge(trajectory.sample, conditions))
            conds.append(self.policy.encode(conditions))
            if rejection:  # pairs of noise and data take the place of a step's two ends
                noise = self.policy.noise(conditions, self._generators("flow_matching", step, chunk + offset))
                trajectory.states = {0: noise, 1: trajectory.sample}
            states.append(self._kept(trajectory.states))
            log_probs.append(trajectory.log_probs)
            finite.append(trajectory.sample.isfinite().all())
            del trajectory  # its samples would wait on the device otherwise
        batch = RolloutBatch(
            cond={name: torch.cat([c[name] for c in conds]) for name in conds[0]},
            # each part goes as it is joined, or all states would be held twice
            states={i: torch.cat([part.pop(i) for part in states]) for i in list(states[0])},
            steps=steps,
            drawn_log_probs=torch.cat(log_probs),
            advantages=torch.zeros(len(mine), device=mine.device),
            num_own=len(mine),
            num_images=slots.numel(),
            finite=bool(torch.stack(finite).all()),
        )
        if rejection:
            generators = self._generators("time", step, torch.arange(len(mine)) + offset)
            draws = [torch.rand(1, generator=generator) for generator in generators]
            nothing = torch.zeros(len(mine), 1, device=mine.device)
            batch = replace(batch, steps=(0,), times=send(torch.cat(draws), mine.device), drawn_log_probs=nothing)
        return batch, Judged.cat(judged)

    def _kept(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """States where they wait for the update."""
        return {i: state.cpu() for i, state in states.items()} if self.args.offload_trajectories else states

    def _generators(self, stream: str, step: int, indices: Tensor) -> list[torch.Generator]:
        return image_generators(self.args.seed, stream, step, indices.tolist())
