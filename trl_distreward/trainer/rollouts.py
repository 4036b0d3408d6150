# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rollouts: new images for slots of the reference set, with the states and features that training needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditions import Conditions, take
from ..generation import SamplingSchedule
from ..seeds import keyed_generator
from .image_sets import decode_and_extract, generate_for
from .reward_functions import joined
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from .distribution_reward_trainer import DistributionRewardTrainer


@dataclass
class Rollout:
    """New images of one process, K of them, as training and rewards see them."""

    step: int  # optimizer step
    slots: Tensor  # (B, n) replaced places of all processes
    local_slots: Tensor  # (K,) places of this process's images
    schedule: SamplingSchedule  # how they were sampled, with the step's window of noise
    conditions: Conditions  # one per image
    cond: dict[str, Tensor]  # (K, ...) the conditions, encoded
    sample: Tensor  # (K, ...) final samples
    states: dict[int, Tensor]  # (K, ...) samples by grid index
    steps: tuple[int, ...]  # steps whose densities were kept
    log_probs: Tensor  # (K, len(steps)) log-probabilities as drawn
    features: list[dict[str, Tensor]]  # (K, d) per distribution reward and feature space
    finite: Tensor  # (K,) whether sample, image and features are finite
    images: Tensor | None  # (K, C, H, W) uint8, kept if a reward function looks at images
    gather: Callable[[Tensor], Tensor]  # concatenates a tensor's rows over processes

    @cached_property
    def gathered(self) -> list[dict[str, Tensor]]:
        """Features of the images of all processes, in the order of `slots`."""
        return [{space: self.gather(rows) for space, rows in spaces.items()} for spaces in self.features]


class Sampler:
    """Makes rollouts. It has no state: the result depends on the weights, the slots and the step alone."""

    def __init__(self, trainer: "DistributionRewardTrainer"):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator

    def schedule(self, step: int) -> SamplingSchedule:
        """The rollout's schedule at an optimizer step, with its window of noisy steps (MixGRPO, arXiv 2507.21802)."""
        schedule, size = self.args.rollout_schedule, self.args.sde_window_size
        if size is None:
            return schedule
        steps = schedule.trainable_steps
        places = len(steps) - size + 1
        if self.args.sde_window == "random":
            generator = keyed_generator(self.args.seed, "window", step)
            first = int(torch.randint(places, (1,), generator=generator))
        else:
            first = step // self.args.num_iterations // self.args.sde_window_interval % places
        return replace(schedule, sde_steps=steps[first : first + size])

    def local(self, values: Tensor) -> Tensor:
        """This process's contiguous share of a flattened tensor."""
        share = values.numel() // self.accelerator.num_processes
        return values.flatten()[self.accelerator.process_index * share :][:share]

    def image_indices(self, count: int, first: int = 0) -> range:
        """Noise indices of this process's `count` images, where the images of all processes start at `first`."""
        start = first + self.accelerator.process_index * count
        return range(start, start + count)

    def __call__(
        self, model: nn.Module, slots: Tensor, step: int, keep_steps: Sequence[int] = (), keep_states: range = range(0)
    ) -> Rollout:
        """Generates one image per slot of `slots` `(B, n)`, or the best of `best_of_n` candidates."""
        starts = [candidate * slots.numel() for candidate in range(self.args.best_of_n)]
        candidates = [self._once(model, slots, step, keep_steps, keep_states, first=first) for first in starts]
        return candidates[0] if len(candidates) == 1 else self._best(candidates)

    def _once(
        self, model: nn.Module, slots: Tensor, step: int, keep_steps: Sequence[int], keep_states: range, first: int
    ) -> Rollout:
        args, local, schedule = self.args, self.local(slots), self.schedule(step)
        conditions = take(self.trainer.conditions, local.cpu())
        parts = []
        for batch in generate_for(
            self.trainer,
            model,
            conditions,
            schedule,
            (args.seed, "rollout", step),
            indices=self.image_indices(len(local), first),
            batch_size=args.rollout_batch_size or self.trainer.fitting_batch_size,
            keep_steps=keep_steps,
            keep_states=keep_states,
        ):
            stop_if_asked(self.trainer)
            trajectory, cond = batch.trajectory, self.trainer.policy.encode(batch.conditions)
            if args.offload_trajectories:
                trajectory.states = {i: state.cpu() for i, state in trajectory.states.items()}
            parts.append((trajectory, cond, *decode_and_extract(self.trainer, batch.sample, batch.conditions)))
        trajectories, conds, features, finite, images = zip(*parts, strict=True)
        return Rollout(
            step=step,
            slots=slots,
            local_slots=local,
            schedule=schedule,
            conditions=conditions,
            cond={name: torch.cat([cond[name] for cond in conds]) for name in conds[0]},
            sample=torch.cat([t.sample for t in trajectories]),
            # Frees each part as it is joined: otherwise all states would be held twice.
            states={i: torch.cat([t.states.pop(i) for t in trajectories]) for i in list(trajectories[0].states)},
            steps=trajectories[0].steps,
            log_probs=torch.cat([t.log_probs for t in trajectories]),
            features=joined(torch.cat, features),
            finite=torch.cat(finite),
            images=None if images[0] is None else torch.cat(images),
            gather=self.accelerator.gather,
        )

    def _best(self, candidates: list[Rollout]) -> Rollout:
        """Keeps the candidate of each slot whose replaced distance is best by itself (Appendix C)."""
        best = torch.stack([self._alone(candidate) for candidate in candidates]).argmax(dim=0)
        rows = torch.arange(len(best), device=best.device)

        def pick(values: list[Tensor]) -> Tensor:
            device = values[0].device
            return torch.stack(values)[best.to(device), rows.to(device)]

        first = candidates[0]
        picked: dict[str, Any] = {
            name: pick([getattr(candidate, name) for candidate in candidates])
            for name in ("sample", "log_probs", "finite", "images")
            if getattr(first, name) is not None
        }
        states = {i: pick([candidate.states[i] for candidate in candidates]) for i in first.states}
        return replace(first, states=states, features=joined(pick, [c.features for c in candidates]), **picked)

    def _alone(self, rollout: Rollout) -> Tensor:
        """Distribution rewards `(K,)` of each image replaced by itself, float64; minus infinity if not finite."""
        slots = rollout.local_slots[:, None]
        total = torch.zeros(len(slots), dtype=torch.float64, device=slots.device)
        for reward in self.trainer.rewards.all:
            if reward.of_sets:
                spaces = rollout.features[reward.index]
                filled = {space: torch.where(rollout.finite[:, None], v, 0.0) for space, v in spaces.items()}
                total += reward.weight * reward.function.subset_rewards(slots, filled)
        return torch.where(rollout.finite & total.isfinite(), total, -torch.inf)
