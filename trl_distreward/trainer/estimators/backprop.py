# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Back-propagation of the distance through the last steps of sampling (DRaFT, arXiv 2309.17400).

The distance depends on all new images at once. So images are generated without gradients; then the distance's gradient
with respect to their features is computed, over all processes; then every micro-batch repeats its last steps with
gradients, and weights its features by that gradient. Memory does not grow with the set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...conditions import Conditions
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ...sampling import replay, send
from ..rollouts import Rollout
from .base import Estimator, MicroBatch, State, mean_square
from .gradients import (
    REMEDY,
    Gradients,
    check_all_stand,
    feature_gradients,
    own_rows,
    reward_terms,
    straight_through_uint8,
    without_gradient,
)

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig


@dataclass
class TailBatch:
    """The states of a rollout from grid index `first` on, and the gradients of the weighted distances."""

    rollout: Rollout
    first: int
    gradients: Gradients  # (K, d) by this process's features
    offset: float  # makes the loss, which is linear in the features, minus the reward

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        rollout, device = self.rollout, self.rollout.local_slots.device
        count = len(rollout.local_slots)
        for start in range(0, count, size):
            stop = min(start + size, count)
            micro: MicroBatch = {
                "batch": self,
                "rows": slice(start, stop),
                "cond": {name: value[start:stop] for name, value in rollout.cond.items()},
                "states": {i: send(state[start:stop], device) for i, state in rollout.states.items()},
                "weights": torch.full((stop - start,), 1 / rollout.slots.numel(), device=device),
            }
            yield micro, stop == count

    def state_dict(self) -> State:
        raise TypeError("back-propagation makes a single update per rollout: there is no batch to save.")


class Backprop(Estimator):
    """Gradient of the distance of the set in which all new images stand, through the last steps of the SDE or ODE."""

    single_pass = False
    has_advantages = False
    replaces_all = True

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        if not 0 < args.backprop_from <= 1:
            raise ValueError(f"backprop_from={args.backprop_from} must lie in (0, 1]; 1 goes through all steps.")
        check_all_stand(args)
        if args.num_iterations > 1 or args.best_of_n > 1:
            raise ValueError("num_iterations and best_of_n must be 1: 'backprop' trains on every image once.")
        if args.reference_update == "refresh" and args.reference_refresh_steps == "auto":
            raise ValueError("reference_refresh_steps='auto' needs rewards of subsets: give a number of steps.")

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        return super().draw_slots(sampler).view(1, -1)

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        times = self.sampler.schedule(step).times
        return self.sampler(model, slots, step, keep_states=range(self._first_step(times), len(times)))

    def _first_step(self, times: list[float]) -> int:
        """The first grid index at or below the time `backprop_from`; the last step is always gone through."""
        return next((i for i, t in enumerate(times[:-2]) if t <= self.args.backprop_from + 1e-6), len(times) - 2)

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> TailBatch:
        whole, offset = feature_gradients(self.rewards.all, rollout, self.args.reference_set_size), 0.0
        for reward, value in zip(self.rewards.all, rewards, strict=True):
            if reward.of_sets:
                features, found = rollout.gathered[reward.index], whole[reward.index]
                linear = sum((features[space] * rows).sum().item() for space, rows in found.items())
                offset -= reward.weight * value.item() + linear
        return TailBatch(rollout, min(rollout.states), own_rows(self.sampler, rollout, whole), offset)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, batch = self.args, micro_batch["batch"]
        rows, cond = micro_batch["rows"], micro_batch["cond"]
        schedule, penalties = batch.rollout.schedule, []

        trained = partial(self.trainer.velocity, model)
        trained_velocity = partial(checkpoint, trained, use_reentrant=False) if args.checkpoint_steps else trained

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = trained_velocity(x, t, cond)
            if args.beta > 0:
                # The penalty is on the velocity where the sample is. Its gradient does not move the sample.
                held = x.detach()
                own = trained_velocity(held, t, cond) if x.requires_grad else v
                with torch.no_grad():
                    initial = self.trainer.initial_velocity(held, t, cond)
                penalties.append(mean_square(own - initial))
            return v

        x = replay(
            velocity,
            micro_batch["states"],
            schedule.times,
            batch.first,
            noise_schedule=schedule.noise_schedule,
            noise_level=0.0 if schedule.sampler == "ode" else schedule.noise_level,
            sde_steps=schedule.sde_steps,
        )
        images = straight_through_uint8(self.policy.decode(x))
        loss, values, number = micro_batch["weights"].sum() * batch.offset, {}, batch.rollout.slots.numel()
        for reward in self.rewards.all:
            for term in reward_terms(self.trainer, reward, images, batch.rollout, rows, batch.gradients):
                loss = loss + term
        if penalties:
            penalty = torch.stack(penalties).mean(0)
            values["kl"] = penalty.detach()
            loss = loss + args.beta * penalty.sum() / number
        return loss, values

    def num_passes(self) -> int:
        times = self.args.rollout_schedule.times
        return self.args.num_subsets * self.args.replace_size * (len(times) - 1 - self._first_step(times))

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        """Back-propagates every reward to two images."""
        for reward in self.rewards.all:
            if reward.of_sets and (reward.function.credit != "shared" or reward.function.control_variate):
                asked = "set credit='shared', control_variate=False"
                raise ValueError(f"'backprop' takes the distance's own gradient: {asked}.")
            for name, values in without_gradient(self.trainer, reward, images, conditions).items():
                rule = "it must return a tensor, one row each, with a gradient"
                raise ValueError(f"{name!r} returned {values!r} for float32 images in [0, 255]: {rule}; or {REMEDY}.")
