# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Estimators on the forward process: regression of the velocity on noised samples, whatever sampler made them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...generation import image_generators
from ...sampling import send
from ..rollouts import Rollout
from .base import Estimator, MicroBatch, State
from .pairs import Deal, PairBatch

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig


class ForwardProcess(Estimator):
    """Rejection sampling: the flow-matching loss (Eq. 2 of arXiv 2607.02291) on the selected images alone."""

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        if args.num_iterations > 1 or args.beta > 0:
            raise ValueError(
                f"num_iterations={args.num_iterations}, beta={args.beta}: loss_type='rft' has no probability ratio "
                "and no KL. Set num_iterations=1 and beta=0."
            )

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        rollout = self.sampler(model, slots, step)
        args, indices = self.args, self.sampler.image_indices(len(rollout.local_slots))
        generators = image_generators(args.seed, "flow_matching", step, indices)
        noise = self.policy.noise(rollout.conditions, generators)
        device = torch.device("cpu") if args.offload_trajectories else noise.device
        rollout.states = {0: noise.to(device), 1: rollout.sample.to(device)}
        draws = [torch.rand(1, generator=g) for g in image_generators(args.seed, "time", step, indices)]
        rollout.log_probs = send(torch.stack(draws), noise.device)  # (K, 1): the times
        return rollout

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> PairBatch | None:
        accelerator = self.accelerator
        advantages = self.compute_advantages(rewards)
        if not (advantages != 0).any():
            return None
        kept = self.select(rollout, advantages)
        size, processes = len(rollout.local_slots), accelerator.num_processes
        deal = Deal(kept, size, accelerator.gather, accelerator.process_index, processes)
        times = deal(rollout.log_probs)
        return PairBatch(
            cond={name: deal(value) for name, value in rollout.cond.items()},
            states={i: deal(state) for i, state in rollout.states.items()},
            steps=[0],
            grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
            log_probs=torch.zeros_like(times),
            advantages=advantages.expand(rollout.slots.shape).flatten()[deal.mine].float(),
            step_weights=torch.ones(1, device=accelerator.device),
            num_own=deal.num_own,
            num_images=len(kept),
            times=times[:, 0],
        )

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        noise, data = micro_batch["x"], micro_batch["next_x"]
        t = micro_batch["t"].to(data.dtype)
        wide = t.view(-1, *[1] * (data.ndim - 1))
        predicted = self.trainer.velocity(model, (1 - wide) * data + wide * noise, t, micro_batch["cond"])
        loss = (predicted - (noise - data)).square().flatten(1).mean(1)
        return (loss * micro_batch["weights"]).sum(), {"flow_matching_loss": loss}

    def num_passes(self) -> int:
        return self.num_selected()

    def restore(self, state: State) -> PairBatch:
        device = self.accelerator.device
        return PairBatch.from_state(state, device, device)
