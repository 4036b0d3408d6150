# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Losses of (image, step) pairs under a network: the policy gradient, flow matching, and what is logged of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..sampling import Transition, send, transition
from .objective import clipped_policy_loss, gaussian_kl, normalize_ratio


@dataclass
class UpdateStatistics:
    """Weighted sums and extremes over an update's micro-batches."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    ratios: list[Tensor] = field(default_factory=list)
    delta_by_step: Tensor | None = None  # (2, steps of the grid): sums of weighted |Δ log p| and of weights

    def add_delta(self, delta: Tensor, weights: Tensor, step: Tensor, num_steps: int) -> None:
        rows = torch.stack([delta * weights, weights]).double()
        empty = rows.new_zeros(2, num_steps)
        self.delta_by_step = (empty if self.delta_by_step is None else self.delta_by_step).index_add(1, step, rows)

    def add(self, weights: Tensor, **values: Tensor) -> None:
        for name, value in {"weight": torch.ones_like(weights), **values}.items():
            self.sums[name] = self.sums.get(name, 0) + (value.detach().double() * weights).sum()

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and extremes over all pairs of all processes, which all call this."""
        names, found = list(self.sums), {}
        sums = accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
        values = dict(zip(names, sums.tolist(), strict=True))
        weight = values.pop("weight")
        for name, value in values.items():
            found["ratio/mean" if name == "ratio" else name] = value / weight
        if self.delta_by_step is not None:
            delta, weights = accelerator.reduce(self.delta_by_step, reduction="sum").tolist()
            for step, (value, weight) in enumerate(zip(delta, weights, strict=True)):
                if weight > 0:
                    found[f"delta_log_prob/step_{step}"] = value / weight
        if self.ratios:
            ratios = torch.cat(self.ratios)
            extremes = accelerator.gather(torch.stack([ratios.min(), -ratios.max()])[None])
            low, negative_high = extremes.amin(dim=0).tolist()
            found |= {"ratio/min": low, "ratio/max": -negative_high}
        return found


class PairLoss:
    """
    Per pair: the clipped policy gradient with KL (Eq. 6 of arXiv 2607.02291), or flow matching (Eq. 2).

    Args:
        args ([`DiffusionDistributionConfig`]): which, and its constants.
        velocity (`Callable`): `(model, x, t, cond)` of a network.
        initial_velocity (`Callable`): `(x, t, cond)` of the network before training, for the KL.
    """

    def __init__(self, args: Any, velocity: Callable[..., Tensor], initial_velocity: Callable[..., Tensor]):
        self.args, self.velocity, self.initial_velocity = args, velocity, initial_velocity

    def __call__(self, model: nn.Module, pairs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `(P,)` of a micro-batch of `RolloutBatch.micro_batches`, and what is logged of it, each `(P,)`."""
        velocity = partial(self.velocity, model)
        if self.args.loss_type == "rft":
            return self.flow_matching(velocity, pairs)
        return self.policy_gradient(velocity, pairs)

    def policy_gradient(
        self, velocity: Callable[..., Tensor], pairs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step = self.score(velocity, pairs)
        # On-policy the anchor is the log-probability itself: the ratio is exactly 1, whatever the kernels' noise.
        old = pairs.get("old_log_probs", step.log_prob.detach())
        log_prob = step.log_prob
        if self.args.ratio_normalization:
            old_mean = pairs.get("old_means", step.mean.detach())
            log_prob, old = normalize_ratio(log_prob - old, step.mean, old_mean, step.std), torch.zeros_like(old)
        policy = clipped_policy_loss(log_prob, old, pairs["advantages"], self.args.epsilon)
        values = {
            "ratio": policy.ratio,
            "clip_ratio": policy.clipped,
            "delta_log_prob": (step.log_prob.detach() - pairs["drawn_log_probs"]).abs(),
        }
        loss = policy.loss
        if self.args.beta > 0:
            with torch.no_grad():
                reference = self.score(self.initial_velocity, pairs)
            values["kl"] = gaussian_kl(step.mean, reference.mean, step.std)
            loss = loss + self.args.beta * values["kl"]
        return loss, values

    def flow_matching(
        self, velocity: Callable[..., Tensor], pairs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`|v(x_t, t) - (x_1 - x_0)|²` on selected images `x_0`, mean over dimensions."""
        noise, data, t = pairs["x"], pairs["next_x"], pairs["t"].to(pairs["x"].dtype)
        wide = t.view(-1, *[1] * (data.ndim - 1))
        predicted = velocity((1 - wide) * data + wide * noise, t, pairs["cond"])
        loss = (predicted - (noise - data)).square().flatten(1).mean(1)
        return loss, {"flow_matching_loss": loss}

    def score(self, velocity: Callable[..., Tensor], pairs: dict[str, Any]) -> Transition:
        """Density of the taken steps under `velocity(x, t, cond)`."""
        schedule = self.args.rollout_schedule
        return transition(
            pairs["x"],
            velocity(pairs["x"], pairs["t"], pairs["cond"]),
            pairs["t"],
            pairs["t_next"],
            noise_schedule=schedule.noise_schedule,
            noise_level=schedule.noise_level,
            start=schedule.times[0],
            prev_sample=pairs["next_x"],
        )

    def step_weights(self, steps: tuple[int, ...], device: torch.device) -> Tensor:
        """Weights `(len(steps),)` proportional to the steps' noise, of mean 1."""
        schedule = self.args.rollout_schedule
        times = torch.tensor(schedule.times, dtype=torch.float64)
        index, nothing = torch.tensor(steps), torch.zeros(len(steps), 1, dtype=torch.float64)
        step = transition(
            nothing,
            nothing,
            times[index],
            times[index + 1],
            noise_schedule=schedule.noise_schedule,
            noise_level=schedule.noise_level,
            start=schedule.times[0],
            prev_sample=nothing,
        )
        return send((step.std / step.std.mean()).float(), device)
