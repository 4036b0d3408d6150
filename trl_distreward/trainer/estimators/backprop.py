# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Back-propagation of the distance through the last steps of sampling (DRaFT, arXiv 2309.17400).

The distance of the updated set depends on all new images at once, the network on a micro-batch of them. So images are
first generated without gradients; then the gradient of the distance with respect to their features is computed, over
all processes; then every micro-batch repeats its last steps with gradients and weights its features by that gradient.
The sum is the gradient of the whole set's distance, and memory does not grow with the set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...conditions import take
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ...rewards.subset_replace import SubsetReplaceReward
from ...sampling import replay, send
from ..reward_functions import Reward
from ..rollouts import Rollout
from .base import Estimator, MicroBatch

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig

_REMEDY = "use a policy gradient instead, which needs no gradient: loss_type='grpo' with sampler='sde'"


@dataclass
class TailBatch:
    """
    The states of a rollout from grid index `first` on, the gradients `(K, d)` of the weighted distances with respect
    to the features of this process's images, per distribution reward and space, and a constant `offset` that makes
    the loss, which is linear in the features, minus the reward.
    """

    rollout: Rollout
    first: int
    gradients: list[dict[str, Tensor]]
    offset: float

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        rollout, device = self.rollout, self.rollout.local_slots.device
        count = len(rollout.local_slots)
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            number = here.stop - start
            yield (
                {
                    "batch": self,
                    "rows": send(torch.arange(start, here.stop), device),
                    "cond": {name: value[here] for name, value in rollout.cond.items()},
                    "conditions": take(rollout.conditions, range(start, here.stop)),
                    "states": {i: send(state[here], device) for i, state in rollout.states.items()},
                    "weights": torch.full((number,), 1 / rollout.slots.numel(), device=device),
                },
                here.stop == count,
            )

    def state_dict(self) -> dict[str, Any]:
        raise TypeError("back-propagation makes a single update per rollout: there is no batch to save.")


class Backprop(Estimator):
    """Gradient of the distance of the set in which all new images stand, through the last steps of the SDE or ODE."""

    single_pass = False

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        if not 1 <= args.backprop_steps <= args.num_inference_steps:
            raise ValueError(
                f"backprop_steps={args.backprop_steps} must lie in 1 to num_inference_steps="
                f"{args.num_inference_steps}."
            )
        images = args.num_subsets * args.replace_size
        if images >= args.reference_set_size:
            raise ValueError(
                f"num_subsets * replace_size = {images} images are not fewer than reference_set_size="
                f"{args.reference_set_size}: under loss_type='backprop' all of them replace their slots at once. "
                "Lower num_subsets or raise reference_set_size."
            )
        if args.num_iterations > 1 or args.num_generations > 1 or args.best_of_n > 1:
            raise ValueError(
                f"num_iterations={args.num_iterations}, num_generations={args.num_generations}, best_of_n="
                f"{args.best_of_n}: loss_type='backprop' trains on every image of a rollout, once. Set them to 1."
            )
        if args.reference_update == "refresh" and args.reference_refresh_steps == "auto":
            raise ValueError(
                "reference_refresh_steps='auto' measures drift by the rewards of subsets, which loss_type='backprop' "
                "does not have: set reference_update='rolling' or a number of steps."
            )

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        args = self.args
        return sampler.draw(args.num_subsets, args.replace_size, distinct=True).view(1, -1)

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        last = len(self.args.rollout_schedule.times) - 1
        first = last - self.args.backprop_steps
        return self.sampler(model, slots, step, keep_states=range(first, last + 1))

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> TailBatch:
        share = rollout.slots.numel() / self.args.reference_set_size
        mine = self.sampler.local(torch.arange(rollout.slots.numel(), device=rollout.slots.device))
        gradients, offset = [], 0.0
        for reward, value in zip(self.rewards.all, rewards, strict=True):
            if reward.of_sets:
                function: SubsetReplaceReward = reward.function
                features = rollout.gathered[reward.index]
                # divided by the replaced share of the set, so that the scale does not depend on it
                found = function.gradient(rollout.slots[0], features)
                whole = {space: rows * (reward.weight / share) for space, rows in found.items()}
                gradients.append({space: rows[mine] for space, rows in whole.items()})
                linear = sum((features[space] * rows).sum().item() for space, rows in whole.items())
                offset -= reward.weight * value.item() + linear
        return TailBatch(rollout, min(rollout.states), gradients, offset)

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, batch = self.args, micro_batch["batch"]
        rows, cond, conditions = micro_batch["rows"], micro_batch["cond"], micro_batch["conditions"]
        schedule, penalties = batch.rollout.schedule, []

        def trained_velocity(x: Tensor, t: Tensor) -> Tensor:
            if args.checkpoint_steps:
                return checkpoint(partial(self.trainer.velocity, model), x, t, cond, use_reentrant=False)
            return self.trainer.velocity(model, x, t, cond)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = trained_velocity(x, t)
            if args.beta > 0:
                # The penalty is on the velocity where the sample is. Its gradient does not move the sample.
                held = x.detach()
                own = trained_velocity(held, t) if x.requires_grad else v
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

    def _scores(self, reward: Reward, images: Tensor, conditions: Any, slots: Tensor) -> Tensor:
        return reward.function(images=images, conditions=conditions, slots=slots, trainer_state=self.trainer.state)

    def num_passes(self) -> int:
        args = self.args
        return args.num_subsets * args.replace_size * args.backprop_steps

    # ---- checks ----

    def check_rewards(self, images: Tensor, conditions: Any) -> None:
        """Back-propagates every reward to two images."""
        tracked = 64 + images.float() / 2  # avoids 0 and 255, where rounding or clamping hides the gradient
        tracked.requires_grad_()
        for reward in self.rewards.all:
            with torch.enable_grad():
                if reward.of_sets:
                    _check_distance(tracked, conditions, reward.function)
                else:
                    self._check_function(tracked, conditions, reward)

    def _check_function(self, tracked: Tensor, conditions: Any, reward: Reward) -> None:
        if not getattr(reward.function, "differentiable", False):
            raise ValueError(
                f"reward function {reward.name!r} is not marked as differentiable. If it returns a tensor with "
                "gradients to float32 images in [0, 255], set its attribute differentiable=True; otherwise "
                f"{_REMEDY}."
            )
        scores = self._scores(reward, tracked, conditions, torch.arange(2, device=tracked.device))
        if not isinstance(scores, Tensor) or scores.shape != (2,) or _has_no_gradient(scores, tracked):
            raise ValueError(
                f"reward function {reward.name!r} returned {scores!r} for 2 images: it must return a tensor of shape "
                f"(2,) with a gradient to them; otherwise {_REMEDY}."
            )


def straight_through_uint8(images: Tensor) -> Tensor:
    """Rounds images in [0, 1] to whole numbers in [0, 255], float32; the gradient ignores the rounding."""
    scaled = images * 255
    return scaled + (scaled.round() - scaled).detach()


def _check_distance(tracked: Tensor, conditions: Any, reward: SubsetReplaceReward) -> None:
    if reward.credit != "shared" or reward.control_variate:
        raise ValueError(
            "loss_type='backprop' takes the gradient of the distance itself: set credit='shared' and "
            "control_variate=False."
        )
    lacking = [space for space, distance in reward.distances.items() if not hasattr(distance, "gradient")]
    if lacking:
        raise ValueError(f"the distances of {', '.join(lacking)} have no gradient: {_REMEDY}.")
    for space, values in reward.extract(tracked, conditions, gradient=True).items():
        if _has_no_gradient(values, tracked):
            raise ValueError(f"feature extractor {space!r} passes no gradient to its images: {_REMEDY}.")


def _has_no_gradient(values: Tensor, tracked: Tensor) -> bool:
    if not values.requires_grad:
        return True
    # Uneven weights: the plain sum may be the same for all images, and squares have no gradient at 0.
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    (gradient,) = torch.autograd.grad(values, tracked, weights, allow_unused=True)
    return gradient is None or not bool((gradient != 0).any())
