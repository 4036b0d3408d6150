# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Back-propagating distances through the last steps of sampling, where rewards are differentiable.

The distance of the updated set depends on all new images at once, the network on a micro-batch of them. So images are
generated without gradients first; the gradient of the distance by their features is computed, over all processes; and
each micro-batch takes its last steps once more, with gradients, weighing its features by theirs. What that adds up to
is the gradient of the whole set's distance, and memory does not grow with the set.

Truncation to the last steps is DRaFT's (arXiv 2309.17400), random truncation AlignProp's (arXiv 2310.03739).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditions import take
from ..generation import SamplingSchedule, image_generators, sample
from ..policies import DiffusionPolicy
from ..rewards.subset_replace import SubsetReplaceReward
from ..sampling import replay, send
from .judged import Judge, Judged
from .rollouts import Rollouts


@dataclass
class Tail:
    """
    The last steps of one process's trajectories.

    Attributes:
        conditions: one per image.
        cond (`dict[str, torch.Tensor]` of shapes `(K, ...)`): encoded.
        states (`dict[int, torch.Tensor]` of shape `(K, ...)`): samples at grid index `first` and after.
        first (`int`): grid index where gradients begin.
        judged ([`Judged`]): what the rewards of sets need of the images.
        finite (`bool`): whether all samples are.
    """

    conditions: Any
    cond: dict[str, Tensor]
    states: dict[int, Tensor]
    first: int
    judged: Judged
    finite: bool

    def micro_batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, dict[str, Tensor], Any, Any]]:
        """Rows, and their encoded conditions, conditions and states on `device`, at most `size` at a time."""
        for rows in torch.arange(len(self.states[self.first])).split(size):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            cond = {name: value[here] for name, value in self.cond.items()}
            states = {i: send(state[here], device) for i, state in self.states.items()}
            yield send(rows, device), cond, take(self.conditions, rows), states


class TailRollouts(Rollouts):
    """Rollouts that keep their last steps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        size = self.args.decode_batch_size or self.args.per_device_train_batch_size
        self.judge = Judge(self.policy, self.rewards, size, self.accelerator.device)

    def num_steps(self, step: int) -> int:
        """How many of the last steps the update at optimizer step `step` goes back."""
        if self.args.backprop_steps != "random":
            return int(self.args.backprop_steps)
        (generator,) = image_generators(self.args.seed, "truncation", step, [0])
        return 1 + int(torch.randint(self.args.num_inference_steps, (1,), generator=generator))

    @torch.no_grad()
    def tails(self, model: nn.Module, slots: Tensor, step: int) -> list[Tail]:
        """
        New images for `slots` `(M,)`, each process a share: the first [`Tail`] is the sampler's. With several
        `backprop_draws` (DRaFT-LV) as many follow, whose last step starts from the same images noised again.
        """
        args, schedule, mine = self.args, self.schedule(step), self.local(slots).cpu()
        last = len(schedule.times) - 1
        first = last - self.num_steps(step)
        offset = self.accelerator.process_index * len(mine)
        parts: list[tuple[dict[int, Tensor], dict[str, Tensor]]] = []
        for chunk in torch.arange(len(mine)).split(args.rollout_batch_size or args.per_device_train_batch_size):
            conditions = take(self.conditions, mine[chunk])
            generators = self._generators("rollout", step, chunk + offset)
            keep = range(first, last + 1)
            with self.autocast():
                trajectory = sample(self.policy, model, conditions, schedule, generators, keep_states=keep)
            parts.append((self._kept(trajectory.states), self.policy.encode(conditions)))
            del trajectory  # its samples would wait on the device otherwise
        conditions = take(self.conditions, mine)
        cond = {name: torch.cat([c[name] for _, c in parts]) for name in parts[0][1]}
        # each part goes as it is joined, or all states would be held twice
        states = {i: torch.cat([s.pop(i) for s, _ in parts]) for i in list(parts[0][0])}

        def tail(states: dict[int, Tensor], final: Tensor) -> Tail:
            judged, finite = self.judge(final, conditions), bool(final.isfinite().all())
            return Tail(conditions, cond, self._kept(states), first, judged, finite)

        data = send(states[last], self.accelerator.device)
        tails = [tail(states, data)]
        for i in range(args.backprop_draws if args.backprop_draws > 1 else 0):
            stream = ("draw", step, i * slots.numel() + offset)
            states = self._noised_again(model, data, cond, conditions, schedule, stream)
            tails.append(tail(states, states[last]))
        return tails

    def _noised_again(
        self,
        model: nn.Module,
        data: Tensor,
        cond: dict[str, Tensor],
        conditions: Any,
        schedule: SamplingSchedule,
        stream: tuple[str, int, int],
    ) -> dict[int, Tensor]:
        """States at both ends of a last step taken from the noised `data`, without noise of its own."""
        name, step, offset = stream
        last, t = len(schedule.times) - 1, schedule.times[-2]
        noise = self.policy.noise(conditions, self._generators(name, step, torch.arange(len(data)) + offset))
        noised, ends = (1 - t) * data + t * noise, []
        for rows in torch.arange(len(data)).split(self.args.per_device_train_batch_size):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            x, part = noised[here], {key: value[here] for key, value in cond.items()}
            with self.autocast():
                velocity = self.policy.velocity(model, x, torch.full((len(x),), t, device=x.device), part)
            ends.append(x + (schedule.times[-1] - t) * velocity)
        return {last - 1: noised, last: torch.cat(ends)}


def straight_through_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as whole numbers in [0, 255], float32, with the gradient of the unrounded ones."""
    scaled = images * 255
    return scaled + (scaled.round() - scaled).detach()


class TailLoss:
    """
    What a micro-batch adds to the gradient of the rewards.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        args ([`DiffusionDistributionConfig`]): schedule and weights.
        rollouts ([`TailRollouts`]): tells the schedule.
        rewards (`list`): names, functions and weights; functions that are no [`SubsetReplaceReward`] are called with
            float images.
    """

    def __init__(
        self, policy: DiffusionPolicy, args: Any, rollouts: TailRollouts, rewards: list[tuple[str, Any, float]]
    ):
        self.policy, self.args, self.rollouts, self.rewards = policy, args, rollouts, rewards

    def __call__(
        self,
        velocity: Any,
        initial_velocity: Any,
        batch: tuple[Tensor, dict[str, Tensor], Any, dict[int, Tensor]],
        gradients: list[dict[str, Tensor]],
        slots: Tensor,
        first: int,
        step: int,
        state: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            velocity, initial_velocity (`Callable`): `(x, t, cond)` of the trained and of the initial network.
            batch: of [`Tail.micro_batches`], P images.
            gradients (`list[dict[str, torch.Tensor]]` of shapes `(K, d)`): of the loss by features, per distribution
                reward and space.
            slots (`torch.LongTensor` of shape `(P,)`): places of the images.
            first, step (`int`): where gradients begin, and the optimizer step.
            state: the trainer's, for reward functions.

        Returns:
            sum over the micro-batch's images, and what is logged of each `(P,)`.
        """
        rows, cond, conditions, states = batch
        schedule, penalties = self.rollouts.schedule(step), []

        def step_velocity(x: Tensor, t: Tensor) -> Tensor:
            v = trained_velocity(x, t)
            if self.args.beta > 0:
                # a pull on the velocity where the sample is, none on the sample: the reference has no gradient by it
                held = x.detach()
                own = trained_velocity(held, t) if x.requires_grad else v
                with torch.no_grad():
                    reference = initial_velocity(held, t, cond)
                penalties.append((own - reference).square().flatten(1).mean(1))
            return v

        def trained_velocity(x: Tensor, t: Tensor) -> Tensor:
            if self.args.checkpoint_steps:
                return checkpoint(velocity, x, t, cond, use_reentrant=False)
            return velocity(x, t, cond)

        # With several draws the last step is taken from fresh noise, without noise of its own
        noiseless = schedule.sampler == "ode" or self.args.backprop_draws > 1
        x = replay(
            step_velocity,
            states,
            schedule.times,
            first,
            noise_schedule=schedule.noise_schedule,
            noise_level=0.0 if noiseless else schedule.noise_level,
            sde_steps=schedule.sde_steps,
        )
        images = straight_through_uint8(self.policy.decode(x))
        loss, known, values = x.new_zeros(()), iter(gradients), {}
        for name, function, weight in self.rewards:
            if isinstance(function, SubsetReplaceReward):
                features = function.extract(images, conditions, check_finite=False, gradient=True)
                for space, gradient in next(known).items():
                    loss = loss + (features[space] * gradient[rows].to(features[space].dtype)).sum()
            else:
                scores = function(images=images, conditions=conditions, slots=slots, trainer_state=state)
                loss = loss - weight * scores.sum() / self.args.num_subsets / self.args.replace_size
                values[f"rewards/{name}/mean"] = scores.detach()
        if penalties:
            penalty = torch.stack(penalties).mean(0)
            values["kl"] = penalty.detach()
            loss = loss + self.args.beta * penalty.sum() / (self.args.num_subsets * self.args.replace_size)
        return loss, values
