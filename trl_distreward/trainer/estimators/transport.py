# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Transport: moves every new image along the gradient of the rewards, and matches the flow to that.

The gradient by a sample `x_0` runs through decoder and feature extractor, never through sampler or network. Scaled to
`transport_size`, it is the displacement δ of the sample. The velocity at `x_t`, made from the sample as it is, is
regressed on `v_old - δ`. The minimiser is `v_old - E[δ | x_t]`: a step of the distance's Wasserstein gradient flow.

`x_t` stays at `x_0`. At `x_0 + δ` the step would be adversarial: what no sample of the generator varies along, such as
a texture that fools the extractor, would be learnt. Here the old policy takes it back.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...conditions import Conditions, take
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ..reward_functions import Reward
from ..rollouts import Rollout
from ..stopping import stop_if_asked
from .forward_process import ForwardProcess, MicroBatch, mean_square, regression
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


class Transport(ForwardProcess):
    """
    Displacement along the gradient of all differentiable rewards. `transport_advantage` adds DiffusionNFT's pull by
    the advantages of all rewards; functions without a gradient act through it alone.
    """

    uses_old = True

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        check_all_stand(args)
        if args.best_of_n > 1:
            raise ValueError(f"best_of_n={args.best_of_n}: 'transport' moves every image of a rollout. Set 1.")

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        self.moving: list[Reward] = []
        for reward in self.rewards.all:
            with torch.enable_grad():
                x = tracked(images)
                if reward.of_sets:
                    check_distance(reward.function)
                    found = reward.function.extract(x, conditions, gradient=True).values()
                else:
                    found = [self._scores(reward, x, conditions, torch.arange(2))]
            if all(has_gradient(values, x) for values in found):
                self.moving.append(reward)
            elif reward.of_sets or self.args.transport_advantage == 0:
                raise ValueError(f"{reward.name!r} has no gradient to images: set transport_advantage, or {REMEDY}.")

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        return sampler.draw(self.args.num_subsets, self.args.replace_size, distinct=True)

    @torch.enable_grad()
    def displacement(self, rollout: Rollout) -> Tensor:
        args, sample = self.args, rollout.sample
        size = args.decode_batch_size or args.per_device_train_batch_size
        rows = self.sampler.local(torch.arange(rollout.slots.numel(), device=sample.device))
        whole = feature_gradients(self.rewards, rollout, args.reference_set_size)
        gradients = [{space: values[rows] for space, values in spaces.items()} for spaces in whole]
        parts: list[list[Tensor]] = []
        for start in range(0, len(sample), size):
            stop_if_asked(self.trainer)
            stop = min(start + size, len(sample))
            x = sample[start:stop].detach().requires_grad_()
            images = straight_through_uint8(self.policy.decode(x))
            conditions = take(rollout.conditions, range(start, stop))
            losses = []
            for reward in self.moving:
                if reward.of_sets:
                    features = reward.function.extract(images, conditions, check_finite=False, gradient=True)
                    wanted = gradients[reward.index]
                    losses.append(sum((features[k] * wanted[k][start:stop].to(features[k])).sum() for k in features))
                else:
                    slots = rollout.local_slots[start:stop]
                    scores = self._scores(reward, images, conditions, slots)
                    losses.append(-reward.weight * scores.sum() / rollout.slots.numel())
            parts.append([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])
        downhill = [-torch.cat(found) for found in zip(*parts, strict=True)]
        if args.multi_objective_aggregation == "normalize_then_sum" and len(downhill) > 1:
            weights = [abs(reward.weight) for reward in self.moving]
            downhill = [weight * self.scaled(each) for weight, each in zip(weights, downhill, strict=True)]
        return args.transport_size * self.scaled(sum(downhill[1:], start=downhill[0]))

    def _scores(self, reward: Reward, images: Tensor, conditions: Conditions, slots: Tensor) -> Tensor:
        return call_with_gradient(self.rewards, reward, images, conditions, slots, self.trainer.state)

    def scaled(self, x: Tensor) -> Tensor:
        """Scales `(K, ...)` to a root mean square of 1 over all processes; 0 stays 0."""
        mean = self.accelerator.reduce(mean_square(x).double().mean(), reduction="mean")
        return x / mean.sqrt().clamp(min=torch.finfo(torch.float32).tiny).to(x)

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, old, drawn = self.args, pairs["old"], pairs["drawn"]
        pull = args.transport_advantage * (pairs["advantages"] / args.advantage_clip).clamp(-1, 1)
        target = old - pairs["displacement"] + pull.view(-1, *[1] * (old.ndim - 1)) * (drawn - old)
        loss = regression(v, target, old, drawn, pairs["t"])
        return loss, {"old_policy_distance": mean_square(v - old).detach()}
