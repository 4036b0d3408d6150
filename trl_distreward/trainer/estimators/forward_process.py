# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Estimators on the forward process: the velocity is regressed on noised samples, whatever sampler made them.

No density is needed and nothing of the trajectory is kept: a final sample `x_0`, fresh noise `x_1` and drawn times `t`
give `x_t = (1-t) x_0 + t x_1` and the drawn velocity `v* = x_1 - x_0`. What is trained is the velocity without
guidance.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from ...files import State
from ...generation import image_generators
from ...policies import source_of
from ...sampling import send
from ..ema import OldPolicy
from ..rollouts import Rollout
from ..stopping import stop_if_asked
from .base import Estimator, MicroBatch, mean_square
from .pairs import Deal, StoredBatch, cut_pairs
from .policy_gradient import clipped_policy_loss

if TYPE_CHECKING:
    from ..distribution_reward_trainer import DistributionRewardTrainer

logger = get_logger(__name__)

_DISTILLED = ("lcm", "tcd", "turbo", "schnell", "lightning", "hyper-sd", "distill")  # in the names of such models


@dataclass
class SampleBatch(StoredBatch):
    """Final samples of one process, K of them, each with S times and noises."""

    cond: dict[str, Tensor]  # (K, ...) encoded conditions
    sample: Tensor  # (K, ...) x_0
    noise: Tensor  # (K, S, ...) x_1
    times: Tensor  # (K, S) in [0, 1]
    dropped: Tensor  # (K, S) pairs without their condition
    advantages: Tensor  # (K,) float32
    num_own: int  # images that count; a process left without any holds one that does not
    num_images: int  # images that count, over all processes
    displacement: Tensor | None = None  # (K, ...) where transport moves each sample
    old: Tensor | None = None  # (K, S, ...) velocities of the old policy

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        device = self.advantages.device
        for pairs in cut_pairs(self.num_own, self.num_images, self.times.shape[1], size, processes):
            rows, columns = send(pairs.image, device), send(pairs.column, device)
            x, x_1, t = self.sample[rows], self.noise[rows, columns], self.times[rows, columns]
            wide = t.view(-1, *[1] * (x.ndim - 1))
            micro: MicroBatch = {
                "cond": {name: value[rows] for name, value in self.cond.items()},
                "x": (1 - wide) * x + wide * x_1,
                "t": t,
                "drawn": x_1 - x,
                "dropped": self.dropped[rows, columns],
                "advantages": self.advantages[rows],
                "weights": send(pairs.weights, device),
            }
            if self.displacement is not None:
                micro["displacement"] = self.displacement[rows]
            if self.old is not None:
                micro["old"] = self.old[rows, columns]
            yield micro, pairs.is_last


class ForwardProcess(Estimator):
    """Base class, and rejection sampling: the flow-matching loss (Eq. 2) on the selected images."""

    guided_loss = False

    def __init__(self, trainer: "DistributionRewardTrainer"):
        super().__init__(trainer)
        self.old: OldPolicy | None = None
        scheduler = getattr(getattr(self.policy, "pipeline", None), "scheduler", None)
        name = f"{Path(source_of(self.policy) or '').name} with {type(scheduler).__name__}"  # not the folders above
        if any(mark in name.lower() for mark in _DISTILLED):
            remedy = "train what it was distilled from, or use loss_type='grpo'"
            logger.warning(f"{name} looks distilled for few steps, which this loss makes blurry: {remedy}.")

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        args, network = self.args, self.trainer.network
        if self.uses_old:
            if self.old is None or step == 0:
                self.old = OldPolicy(network, args.old_policy_decay)
            self.old.follow(network)
        old_policy = self.old if args.sample_old_policy else None
        with nullcontext() if old_policy is None else old_policy.swapped_in(network):
            return self.sampler(model, slots, step)

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> SampleBatch | None:
        advantages, displacement = self.compute_advantages(rewards), self.displacement(rollout)
        if displacement is None and not (advantages != 0).any():
            return None
        kept = self.select(rollout, advantages)
        deal = Deal(kept, len(rollout.local_slots), self.accelerator)
        batch = SampleBatch(
            cond={name: deal(value) for name, value in rollout.cond.items()},
            sample=deal(rollout.sample),
            **self._draw(rollout, deal.mine),
            advantages=advantages.expand(rollout.slots.shape).flatten()[deal.mine].float(),
            num_own=deal.num_own,
            num_images=len(kept),
            displacement=None if displacement is None else deal(displacement),
        )
        if self.old is not None:
            batch.old = self._old_velocities(batch)
        return batch

    def displacement(self, rollout: Rollout) -> Tensor | None:
        """Displacements of this process's samples `(K, ...)` by transport; `None` for other estimators."""
        return None

    def _draw(self, rollout: Rollout, images: Tensor) -> dict[str, Tensor]:
        """Draws the times, noises and dropped conditions of images, by their number among those of all processes."""
        args, count = self.args, self.args.num_train_timesteps
        sample, noise, times, dropped = rollout.sample, [], [], []
        for generator in image_generators(args.seed, "forward", rollout.step, images.tolist()):
            draws = torch.rand(2, count, generator=generator)
            times.append((torch.arange(count) + draws[0]) / count)  # one time in each of `count` equal parts
            dropped.append(draws[1] < args.condition_dropout)
            noise.append(torch.randn(count, *sample.shape[1:], generator=generator))
        drops = torch.stack(dropped) & getattr(self.policy, "guided", False)
        stacked = {"noise": torch.stack(noise), "times": torch.stack(times), "dropped": drops}
        return {name: send(value, sample.device) for name, value in stacked.items()}

    @torch.no_grad()
    def _old_velocities(self, batch: SampleBatch) -> Tensor:
        """Velocities of the old policy `(K, S, ...)` for every sample and time."""
        assert self.old is not None
        trainer, found = self.trainer, []
        size = self.args.rollout_batch_size or trainer.fitting_batch_size
        micro_batches = batch.micro_batches(size, self.accelerator.num_processes)
        with self.old.swapped_in(trainer.network):
            for micro, _ in micro_batches:
                stop_if_asked(trainer)
                found.append(self.velocity(trainer.model_wrapped, micro))
        pairs = torch.cat(found)[: max(1, batch.num_own) * batch.times.shape[1]]
        return pairs.view(batch.noise.shape)

    def velocity(self, model: nn.Module, pairs: MicroBatch) -> Tensor:
        """The velocity `(P, ...)` of a network without guidance."""
        return self.trainer.velocity(model, pairs["x"], pairs["t"], pairs["cond"], pairs["dropped"])

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        v = self.velocity(model, micro_batch)
        loss, values = self.pair_loss(v, micro_batch)
        if self.args.beta > 0:
            with torch.no_grad():
                pairs = (micro_batch[name] for name in ("x", "t", "cond", "dropped"))
                initial = self.trainer.initial_velocity(*pairs)
            values["kl"] = mean_square(v - initial)
            loss = loss + self.args.beta * values["kl"]
        return (loss * micro_batch["weights"]).sum(), values

    def pull(self, pairs: MicroBatch) -> Tensor:
        """DiffusionNFT's pull `(P,)` towards the drawn velocity, in [-1, 1]."""
        return (pairs["advantages"] / self.args.advantage_clip).clamp(-1, 1)

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss `(P,)` of each pair of a sample and a time, and what to log."""
        loss = mean_square(v - pairs["drawn"])
        return loss, {"flow_matching_loss": loss}

    def num_passes(self) -> int:
        return self.num_selected() * self.args.num_train_timesteps

    def restore(self, state: State) -> SampleBatch:
        return SampleBatch.from_state(state, self.accelerator.device)

    def state_dict(self) -> State:
        return {} if self.old is None else {"old_policy": dict(self.old.averages)}  # whole tensors are written

    def load_state_dict(self, state: State) -> None:
        if self.uses_old:
            self.old = OldPolicy(self.trainer.network, self.args.old_policy_decay)
            self.old.load_state_dict(state["old_policy"])


class NFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117): pulls the velocity to the drawn one by its advantage, and to the old one."""

    uses_old = True

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = nft_loss(v, pairs["old"], pairs["drawn"], pairs["t"], self.pull(pairs), self.args.nft_beta)
        return loss, {"old_policy_distance": mean_square(v - pairs["old"]).detach()}


class AWM(ForwardProcess):
    """AWM (arXiv 2509.25050): a clipped policy gradient with minus the velocity's squared error as log-density."""

    uses_old = True

    def pair_loss(self, v: Tensor, pairs: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_prob, old = (-mean_square(velocity - pairs["drawn"]) for velocity in (v, pairs["old"]))
        policy = clipped_policy_loss(log_prob, old, pairs["advantages"], self.args.epsilon)
        return policy.loss, {"ratio": policy.ratio, "clip_ratio": policy.clipped}


def mean_size(x: Tensor, t: Tensor) -> Tensor:
    """Mean absolute value `(P,)` of `(P, ...)`, detached; a predicted sample's error, t times it, is at least 1e-5."""
    return torch.maximum(x.detach().abs().flatten(1).mean(1), 1e-5 / t.clamp(min=1e-5))


def nft_loss(v: Tensor, old: Tensor, drawn: Tensor, t: Tensor, pull: Tensor, beta: float = 1.0) -> Tensor:
    """
    Loss of DiffusionNFT (arXiv 2509.16117, Eq. 5 and its adaptive weights), `(P,)`, for velocities `(P, ...)`.

    With the optimality `r = (1 + pull) / 2`, `v⁺ = (1-β) v_old + β v` and `v⁻ = (1+β) v_old - β v`, it is
    `r |v⁺ - v*|² / m⁺ + (1 - r) |v⁻ - v*|² / m⁻`, measured on predicted samples: times t², and each branch divided by
    its own mean error `t m`. If v is `v_old`, its gradient at β = 1 is that of [`regression`] on
    `v_old + pull (v* - v_old)`.
    """
    error, change = old - drawn, beta * (v - old)
    towards, away = error + change, error - change
    towards_loss = mean_square(towards) / mean_size(towards, t)
    away_loss = mean_square(away) / mean_size(away, t)
    return t * ((1 + pull) / 2 * towards_loss + (1 - pull) / 2 * away_loss)


def regression(v: Tensor, target: Tensor, old: Tensor, drawn: Tensor, t: Tensor) -> Tensor:
    """Squared distance `(P,)` of a velocity from its target, with DiffusionNFT's weight `t / mean|v_old - v*|`."""
    return t * mean_square(v - target) / mean_size(old - drawn, t)
