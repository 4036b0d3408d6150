# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The interface of an estimator: how a reward becomes a gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...policies import DiffusionPolicy
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ..advantages import normalize_advantages, select
from ..reward_functions import RewardFunctions
from ..rollouts import Rollout, Sampler

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig

MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """
    What estimators work with.

    Attributes:
        policy ([`DiffusionPolicy`]), args ([`DiffusionDistributionConfig`]), rewards ([`RewardFunctions`]),
        accelerator (`accelerate.Accelerator`), sampler ([`~trainer.rollouts.Sampler`]): as the trainer has them.
        velocity (`Callable`): `velocity(model, x, t, cond)` under the trainer's autocast.
        initial_velocity (`Callable`): `initial_velocity(x, t, cond)` of the network before training.
        record (`Callable`): `record(name, value)` keeps a value for the next log.
        trainer_state (`Callable`): returns the trainer's state, for reward functions.
    """

    policy: DiffusionPolicy
    args: "DiffusionDistributionConfig"
    rewards: RewardFunctions
    accelerator: Accelerator
    sampler: Sampler
    velocity: Callable[..., Tensor]
    initial_velocity: Callable[..., Tensor]
    record: Callable[[str, float], None]
    trainer_state: Callable[[], Any]


class Batch(Protocol):
    """What one rollout gives to one or several updates."""

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        """
        Yields micro-batches, equally many on every process, and whether each is the last. A micro-batch has the
        `weights` `(P,)` of its rows, which add up to 1 over all processes.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a rollout's updates keeps."""
        ...


class Estimator:
    """
    Base class: how a reward becomes a gradient. An estimator is a subclass in a file of its own, and a line in
    `ESTIMATORS`.

    Args:
        context ([`Context`]): what it works with.
    """

    # Whether `loss` passes the network once. Otherwise DDP sends gradients only after the last micro-batch.
    single_pass = True

    def __init__(self, context: Context):
        self.context = context

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        """Raises `ValueError` for settings that contradict the estimator."""

    def check_rewards(self, images: Tensor, conditions: Any) -> None:
        """Tries the rewards on two uint8 images `(2, C, H, W)`; raises `ValueError` if they do not fit."""

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        """Draws the replaced places `(B, n)`; the `num_generations` subsets of a group replace the same places."""
        args = self.context.args
        groups = args.num_subsets // args.num_generations
        slots = sampler.draw(groups, args.replace_size, distinct=args.reference_update == "rolling")
        return slots.repeat_interleave(args.num_generations, dim=0)

    def compute_advantages(self, rewards: list[Tensor]) -> Tensor:
        """Advantages `(B, 1)` or `(B, n)`: sums and normalizes rewards in the order the configuration asks for."""
        args = self.context.args
        total = self.context.rewards.total(rewards)

        def normalize(values: Tensor) -> Tensor:
            return normalize_advantages(values, args.advantage_normalization, args.num_generations)

        if args.multi_objective_aggregation == "sum_then_normalize":
            return normalize(total)
        normalized = [normalize(values).expand_as(total) for values in rewards]
        return self.context.rewards.total(normalized)

    def select(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Indices `(M,)` of the selected images among those of all processes, ascending."""
        args = self.context.args
        shares = self.context.accelerator.num_processes if args.selection_scope == "local" else 1
        mask = select(advantages, args.selection, args.top_advantage_quantile, shares)
        self.context.record("advantage_kept", mask.double().mean().item())
        return mask.expand(rollout.slots.shape).flatten().nonzero().flatten()

    @torch.no_grad()
    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        """Generates new images for `slots` `(B, n)`, and keeps what `prepare` needs."""
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> Batch | None:
        """
        Turns rewards, one tensor `(B, 1)` or `(B, n)` per function, into a batch; `None` if there is nothing to learn.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes this micro-batch's share of the loss, and values `(P,)` to log."""
        raise NotImplementedError

    def num_passes(self) -> int:
        """Passes of the network with gradients per update, over all processes."""
        raise NotImplementedError

    def num_selected(self) -> int:
        """Images that an update trains on, over all processes."""
        args = self.context.args
        share = args.top_advantage_quantile if args.selection != "all" else 1.0
        ends = 2 if args.selection == "top_bottom" else 1
        return round(args.num_subsets * min(1.0, ends * share)) * args.replace_size

    def restore(self, state: dict[str, Any]) -> Batch:
        """Rebuilds a batch from its `state_dict`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State of the estimator's own, such as an old policy."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
