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

from ...conditions import Conditions, take
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ...rewards.subset_replace import SubsetReplaceReward
from ...sampling import replay, send
from ..reward_functions import Reward
from ..rollouts import Rollout
from .base import Estimator, MicroBatch, State
from .gradients import (
    REMEDY,
    call_with_gradient,
    check_all_stand,
    check_distance,
    feature_gradients,
    has_gradient,
    straight_through_uint8,
    tracked,
)

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig


@dataclass
class TailBatch:
    """The states of a rollout from grid index `first` on, and the gradients of the weighted distances."""

    rollout: Rollout
    first: int
    gradients: list[dict[str, Tensor]]  # (K, d) by this process's features, per distribution reward and space
    offset: float  # makes the loss, which is linear in the features, minus the reward

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        rollout, device = self.rollout, self.rollout.local_slots.device
        count = len(rollout.local_slots)
        for start in range(0, count, size):
            stop = min(start + size, count)
            micro: MicroBatch = {
                "batch": self,
                "rows": send(torch.arange(start, stop), device),
                "cond": {name: value[start:stop] for name, value in rollout.cond.items()},
                "conditions": take(rollout.conditions, range(start, stop)),
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

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        if not 0 < args.backprop_from <= 1:
            raise ValueError(f"backprop_from={args.backprop_from} must lie in (0, 1]; 1 goes through all steps.")
        check_all_stand(args)
        if args.num_iterations > 1 or args.best_of_n > 1:
            raise ValueError("num_iterations and best_of_n must be 1: 'backprop' trains on every image once.")
        if args.reference_update == "refresh" and args.reference_refresh_steps == "auto":
            raise ValueError(
                "reference_refresh_steps='auto' needs rewards of subsets: give 'backprop' a number of steps."
            )

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        return sampler.draw(self.args.num_subsets, self.args.replace_size, distinct=True).view(1, -1)

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        times = self.sampler.schedule(step).times
        return self.sampler(model, slots, step, keep_states=range(self._first_step(times), len(times)))

    def _first_step(self, times: list[float]) -> int:
        """The first grid index at or below the time `backprop_from`; the last step is always gone through."""
        return next((i for i, t in enumerate(times[:-2]) if t <= self.args.backprop_from + 1e-6), len(times) - 2)

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> TailBatch:
        mine = self.sampler.local(torch.arange(rollout.slots.numel(), device=rollout.slots.device))
        whole, offset = feature_gradients(self.rewards, rollout, self.args.reference_set_size), 0.0
        for reward, value in zip(self.rewards.all, rewards, strict=True):
            if reward.of_sets:
                features, found = rollout.gathered[reward.index], whole[reward.index]
                linear = sum((features[space] * rows).sum().item() for space, rows in found.items())
                offset -= reward.weight * value.item() + linear
        gradients = [{space: rows[mine] for space, rows in found.items()} for found in whole]
        return TailBatch(rollout, min(rollout.states), gradients, offset)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, batch = self.args, micro_batch["batch"]
        rows, cond, conditions = micro_batch["rows"], micro_batch["cond"], micro_batch["conditions"]
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
                penalties.append((own - initial).square().flatten(1).mean(1))
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
            if reward.of_sets:
                features = reward.function.extract(images, conditions, check_finite=False, gradient=True)
                for space, gradient in batch.gradients[reward.index].items():
                    loss = loss + (features[space] * gradient[rows].to(features[space].dtype)).sum()
            else:
                scores = self._scores(reward, images, conditions, batch.rollout.local_slots[rows])
                loss = loss - reward.weight * scores.sum() / number
        if penalties:
            penalty = torch.stack(penalties).mean(0)
            values["kl"] = penalty.detach()
            loss = loss + args.beta * penalty.sum() / number
        return loss, values

    def _scores(self, reward: Reward, images: Tensor, conditions: Conditions, slots: Tensor) -> Tensor:
        return call_with_gradient(self.rewards, reward, images, conditions, slots, self.trainer.state)

    def num_passes(self) -> int:
        times = self.args.rollout_schedule.times
        return self.args.num_subsets * self.args.replace_size * (len(times) - 1 - self._first_step(times))

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        """Back-propagates every reward to two images."""
        x = tracked(images)
        for reward in self.rewards.all:
            with torch.enable_grad():
                if reward.of_sets:
                    _check_distance(reward.function)
                    found = reward.function.extract(x, conditions, gradient=True)
                else:
                    found = {reward.name: self._scores(reward, x, conditions, torch.arange(2).to(images.device))}
            for name, values in found.items():
                if not has_gradient(values, x):
                    raise ValueError(
                        f"{name!r} returned {values!r} for 2 images, float32 in [0, 255]: it must return a tensor of "
                        f"2 rows, with a gradient to them; or {REMEDY}."
                    )


def _check_distance(reward: SubsetReplaceReward) -> None:
    if reward.credit != "shared" or reward.control_variate:
        raise ValueError("'backprop' takes the distance's own gradient: set credit='shared', control_variate=False.")
    check_distance(reward)
