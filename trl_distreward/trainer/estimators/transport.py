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
from accelerate.logging import get_logger
from torch import Tensor

from ...conditions import Conditions
from ..reward_functions import Reward
from ..rollouts import Rollout
from ..stopping import stop_if_asked
from .base import mean_square
from .forward_process import ForwardProcess, MicroBatch, regression
from .gradients import (
    REMEDY,
    check_all_stand,
    feature_gradients,
    own_rows,
    reward_terms,
    straight_through_uint8,
    without_gradient,
)

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig

logger = get_logger(__name__)


class Transport(ForwardProcess):
    """Displacement along the rewards' gradient; functions without one act through `transport_advantage` alone."""

    uses_old = True
    replaces_all = True

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        check_all_stand(args)
        if args.best_of_n > 1:
            raise ValueError(f"best_of_n={args.best_of_n}: 'transport' moves every image of a rollout. Set 1.")

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        self.moving: list[Reward] = []
        for reward in self.rewards.all:
            reason = ""
            try:
                if not without_gradient(self.trainer, reward, images, conditions):
                    self.moving.append(reward)
                    continue
            except Exception as error:  # all was well for uint8 images; what it says of float ones is its own
                reason = f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            found = f"{reward.name!r} passes no gradient to float32 images in [0, 255]{reason}"
            if self.args.transport_advantage == 0:
                raise ValueError(f"{found}: set transport_advantage, or {REMEDY}.")
            logger.warning(f"{found}. It moves no image: transport_advantage alone follows it.")

    @torch.enable_grad()
    def displacement(self, rollout: Rollout) -> Tensor:
        args, sample = self.args, rollout.sample
        size = args.decode_batch_size or args.per_device_train_batch_size
        if not self.moving:
            return torch.zeros_like(sample)
        whole = feature_gradients(self.moving, rollout, args.reference_set_size)
        gradients = own_rows(self.sampler, rollout, whole)
        parts: list[list[Tensor]] = []
        for start in range(0, len(sample), size):
            stop_if_asked(self.trainer)
            rows = slice(start, min(start + size, len(sample)))
            x = sample[rows].detach().requires_grad_()
            images = straight_through_uint8(self.policy.decode(x))
            terms = [reward_terms(self.trainer, each, images, rollout, rows, gradients) for each in self.moving]
            parts.append([torch.autograd.grad(each, x, retain_graph=True)[0] for each in terms])
        downhill = [-torch.cat(found) for found in zip(*parts, strict=True)]
        if len(downhill) > 1:  # weights compare spreads
            weights = [abs(reward.weight) for reward in self.moving]
            downhill = [weight * self.scaled(each) for weight, each in zip(weights, downhill, strict=True)]
        return args.transport_size * self.scaled(sum(downhill[1:], start=downhill[0]))

    def scaled(self, x: Tensor) -> Tensor:
        """Scales `(K, ...)` to a root mean square of 1 over all processes; 0 stays 0."""
        mean = self.accelerator.reduce(mean_square(x).double().mean(), reduction="mean")
        return x / mean.sqrt().clamp(min=torch.finfo(torch.float32).tiny).to(x)

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, old, drawn = self.args, pairs["old"], pairs["drawn"]
        pull = args.transport_advantage * self.pull(pairs)
        target = old - pairs["displacement"] + pull.view(-1, *[1] * (old.ndim - 1)) * (drawn - old)
        loss = regression(v, target, old, drawn, pairs["t"])
        return loss, {"old_policy_distance": mean_square(v - old).detach()}
