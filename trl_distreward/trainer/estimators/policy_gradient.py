# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The clipped policy gradient of the SDE's steps (Eq. 6 of arXiv 2607.02291)."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...generation import SamplingSchedule
from ...sampling import Transition, send, transition
from ...seeds import keyed_generator
from ..rollouts import Rollout
from .base import Estimator, MicroBatch, State, mean_square
from .pairs import Deal, PairBatch

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig


class PolicyGradient(Estimator):
    """Policy gradient on the SDE's steps. The first of several updates writes the anchors of the others' ratios."""

    own_sampler = "sde"

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        if args.sampler == "ode":
            raise ValueError("sampler='ode': a policy gradient needs the density of each step. Set sampler='sde'.")

    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        keep_steps = self._trained_steps(self.sampler.schedule(step), step)
        return self.sampler(model, slots, step, keep_steps=keep_steps)

    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> PairBatch | None:
        args = self.args
        advantages = self.compute_advantages(rewards)
        if not (advantages != 0).any():
            return None
        kept = self.select(rollout, advantages)
        deal = Deal(kept, len(rollout.local_slots), self.accelerator)
        log_probs, states = deal(rollout.log_probs), {i: deal(state) for i, state in rollout.states.items()}
        several = args.num_iterations > 1
        means = next(iter(states.values())) if several and args.ratio_normalization else None
        return PairBatch(
            cond={name: deal(value) for name, value in rollout.cond.items()},
            states=states,
            steps=list(rollout.steps),
            grid=torch.tensor(rollout.schedule.times, dtype=torch.float64),
            log_probs=log_probs,
            advantages=advantages.expand(rollout.slots.shape).flatten()[deal.mine].float(),
            step_weights=self._step_weights(rollout.steps),
            num_own=deal.num_own,
            num_images=len(kept),
            old_log_probs=torch.zeros_like(log_probs) if several else None,
            old_means=None if means is None else means.new_zeros(*log_probs.shape, *means.shape[1:]),
        )

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        args, pairs = self.args, micro_batch
        step = self._score(partial(self.trainer.velocity, model), pairs)
        if "anchor" in pairs:
            batch, image, column = pairs["anchor"]
            batch.anchor(image, column, step.log_prob, step.mean)
        log_prob, old = step.log_prob, pairs.get("old_log_probs", step.log_prob.detach())
        if args.ratio_normalization:
            old_mean = pairs.get("old_means", step.mean.detach())
            log_prob, old = normalize_ratio(log_prob - old, step.mean, old_mean, step.std), torch.zeros_like(old)
        policy = clipped_policy_loss(log_prob, old, pairs["advantages"], args.epsilon)
        values = {
            "ratio": policy.ratio,
            "clip_ratio": policy.clipped,
            "delta_log_prob": (step.log_prob.detach() - pairs["log_probs"]).abs(),
        }
        loss = policy.loss
        if args.beta > 0:
            with torch.no_grad():
                initial = self._score(self.trainer.initial_velocity, pairs)
            values["kl"] = gaussian_kl(step.mean, initial.mean, step.std)
            loss = loss + args.beta * values["kl"]
        return (loss * pairs["weights"]).sum(), values

    def num_passes(self) -> int:
        args = self.args
        noisy = args.sde_window_size or len(args.rollout_schedule.trainable_steps)
        return self.num_selected() * max(1, round(args.timestep_fraction * noisy))

    def restore(self, state: State) -> PairBatch:
        device = self.accelerator.device
        elsewhere = dict.fromkeys(("states", "old_means"), "cpu") if self.args.offload_trajectories else {}
        return PairBatch.from_state(state, device, {"grid": "cpu", **elsewhere})  # the host reads the grid

    def _trained_steps(self, schedule: SamplingSchedule, step: int) -> tuple[int, ...]:
        """Draws the share `timestep_fraction` of the steps with noise."""
        args, steps = self.args, schedule.trainable_steps
        if args.timestep_fraction == 1.0:
            return steps
        generator = keyed_generator(args.seed, "steps", step)
        count = max(1, round(args.timestep_fraction * len(steps)))
        return tuple(sorted(steps[int(i)] for i in torch.randperm(len(steps), generator=generator)[:count]))

    def _score(self, velocity: Callable[..., Tensor], pairs: MicroBatch) -> Transition:
        """Scores the taken steps under `velocity(x, t, cond)`."""
        x, t = pairs["x"], pairs["t"]
        return self._transition(x, velocity(x, t, pairs["cond"]), t, pairs["t_next"], pairs["next_x"])

    def _transition(self, x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, next_x: Tensor) -> Transition:
        s = self.args.rollout_schedule
        step = partial(transition, noise_schedule=s.noise_schedule, noise_level=s.noise_level, start=s.times[0])
        return step(x, velocity, t, t_next, prev_sample=next_x)

    def _step_weights(self, steps: tuple[int, ...]) -> Tensor:
        """Weights `(len(steps),)` of mean 1: even, or proportional to the steps' noise."""
        device = self.accelerator.device
        if self.args.step_weighting == "uniform":
            return torch.ones(len(steps), device=device)
        times = torch.tensor(self.args.rollout_schedule.times, dtype=torch.float64)
        index, zeros = torch.tensor(steps), torch.zeros(len(steps), 1, dtype=torch.float64)
        std = self._transition(zeros, zeros, times[index], times[index + 1], zeros).std
        return send((std / std.mean()).float(), device)


class PolicyLoss(NamedTuple):
    """The loss of each (image, step) pair `(P,)`, and what is logged of it."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon: float) -> PolicyLoss:
    """`-min(r A, clip(r, 1 - ε, 1 + ε) A)` with `r = exp(log_prob - old_log_prob)` (Eq. 6), for pairs `(P,)`."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    # "clipped" means that the objective is flat here, so the pair gives no gradient
    clipped = ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))
    return PolicyLoss(loss, ratio.detach(), clipped)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL `(P,)` of `N(mean, std²)` from `N(reference_mean, std²)`, averaged over dimensions; `std` has sqrt(dt)."""
    return mean_square(mean - reference_mean) / (2 * std**2)


def normalize_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """
    GRPO-Guard's ratio normalization (arXiv 2510.22319): puts the log-ratios of all time steps on one scale, around 0.

    A step's log-ratio is `(Δμ·ε)/std - |Δμ|²/(2 std²)`, averaged over dimensions, with `Δμ = mean - old_mean`: it is
    biased below 0 and spreads as `1/std`. Returns `std (log_ratio + |Δμ|²/(2 std²)) = Δμ·ε`, `(P,)`.
    """
    return std * (log_ratio + gaussian_kl(mean, old_mean, std))
