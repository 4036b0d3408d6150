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
from accelerate.utils import gather_object
from torch import Tensor

from ...conditions import Conditions
from ...generation import image_generators
from ..reward_functions import Reward
from ..rollouts import Rollout
from ..stopping import stop_if_asked
from .base import mean_square
from .forward_process import ForwardProcess, MicroBatch, regression
from .gradients import (
    OTHERS,
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
    from ..distribution_reward_trainer import DistributionRewardTrainer

logger = get_logger(__name__)


class Transport(ForwardProcess):
    """Displacement along the rewards' gradient; functions without one act through `transport_advantage` alone."""

    uses_old = True
    replaces_all = True

    def __init__(self, trainer: "DistributionRewardTrainer"):
        super().__init__(trainer)
        vae = getattr(getattr(self.policy, "pipeline", None), "vae", None)
        if vae is not None:  # it holds gigabytes for an image
            self.decoded_at_once = 1
            if getattr(vae, "_supports_gradient_checkpointing", False):
                vae.enable_gradient_checkpointing()  # halves that
        self.decoded_at_once = self.args.decode_batch_size or self.decoded_at_once

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        check_all_stand(args)
        if args.best_of_n > 1:
            raise ValueError(f"best_of_n={args.best_of_n}: 'transport' moves all images. Set 1, or {OTHERS}.")

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        """Finds the rewards along whose gradients images move, the same on all processes."""
        noise = self.policy.noise(conditions, image_generators(0, "check", 0, [0, 1])).to(images.device)
        with torch.enable_grad():
            decodes = self.policy.decode(noise[:1].requires_grad_()).requires_grad
        reason = "" if decodes else "the policy's decode passes no gradient"
        found = {reward.name: reason or self._unmoved(reward, images, conditions) for reward in self.rewards.all}
        reasons = {name: reason for name, reason in found.items() if reason}
        lacking = {name for names in gather_object([list(reasons)]) for name in names}
        self.moving = [reward for reward in self.rewards.all if reward.name not in lacking]
        for name, reason in reasons.items():
            if self.args.transport_advantage == 0:
                raise ValueError(f"{name!r} does not move images ({reason}): set transport_advantage, or {REMEDY}.")
            logger.warning(f"{name!r} does not move images ({reason}). It acts by transport_advantage alone.")

    def _unmoved(self, reward: Reward, images: Tensor, conditions: Conditions) -> str:
        """Says why a reward does not move images; an empty string if it does."""
        try:
            names = without_gradient(self.trainer, reward, images, conditions)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # uint8 images passed: what a function says of others is its own
            return str(error).strip().partition("\n")[0] or type(error).__name__
        return f"{', '.join(names)}: no gradient to float32 images in [0, 255]" if names else ""

    @torch.enable_grad()
    def displacement(self, rollout: Rollout) -> Tensor | None:
        args, sample = self.args, rollout.sample
        if not self.moving:
            return None
        size = self.decoded_at_once
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
        weights = [abs(reward.weight) for reward in self.moving]
        if len(downhill) > 1:  # weights compare spreads
            downhill = [weight * self.scaled(each) for weight, each in zip(weights, downhill, strict=True)]
        share = sum(weights) / sum(abs(reward.weight) for reward in self.rewards.all)
        return args.transport_size * share * self.scaled(sum(downhill[1:], start=downhill[0]))

    def scaled(self, x: Tensor) -> Tensor:
        """Scales `(K, ...)` to a root mean square of 1 over all processes; 0 stays 0."""
        mean = self.accelerator.reduce(mean_square(x).double().mean(), reduction="mean")
        return x / mean.sqrt().clamp(min=torch.finfo(torch.float32).tiny).to(x)

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, old, drawn = self.args, pairs["old"], pairs["drawn"]
        moved = old - pairs["displacement"] if "displacement" in pairs else old
        pull = args.transport_advantage * self.pull(pairs)
        target = moved + pull.view(-1, *[1] * (old.ndim - 1)) * (drawn - old)
        loss = regression(v, target, old, drawn, pairs["t"])
        return loss, {"old_policy_distance": mean_square(v - old).detach()}
