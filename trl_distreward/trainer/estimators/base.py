# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The base class of estimators: how a reward becomes a gradient."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...conditions import Conditions
from ...files import State
from ...rewards.slots import SlotSampler, StratifiedSlotSampler
from ..advantages import normalize_advantages, select
from ..rollouts import Rollout

if TYPE_CHECKING:
    from ..diffusion_distribution_config import DiffusionDistributionConfig
    from ..distribution_reward_trainer import DistributionRewardTrainer

MicroBatch = dict[str, Any]


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over all dimensions but the first: `(P, ...)` to `(P,)`."""
    return x.square().flatten(1).mean(1)


class Batch(Protocol):
    """The part of a rollout that one or several updates are made from."""

    def micro_batches(self, size: int, processes: int) -> Iterator[tuple[MicroBatch, bool]]:
        """Yields micro-batches, and whether each is the last; the `weights` `(P,)` of all processes add up to 1."""

    def state_dict(self) -> State:
        """The state that a checkpoint in the middle of a rollout's updates keeps."""


class Estimator:
    """
    Base class. An estimator is a subclass in a file of its own, and a line in `ESTIMATORS`. Of its trainer it uses
    `policy`, `args`, `rewards`, `accelerator`, `sampler`, `velocity`, `initial_velocity`, `record` and `state`.
    """

    # Whether `loss` passes the network once. Otherwise DDP sends gradients only after the last micro-batch.
    single_pass = True
    has_advantages = True  # whether rewards are compared within an update
    replaces_all = False  # whether all new images stand in the reference set at once, each in a slot of its own
    guided_loss = True  # whether the loss evaluates the network with guidance
    own_sampler = "ode"  # what sampler="auto" stands for
    uses_old = False  # whether the loss compares with an average of the weights

    def __init__(self, trainer: "DistributionRewardTrainer"):
        self.trainer, self.policy, self.args = trainer, trainer.policy, trainer.args
        self.rewards, self.accelerator, self.sampler = trainer.rewards, trainer.accelerator, trainer.sampler
        self.decoded_at_once = trainer.args.per_device_train_batch_size  # images, where gradients pass the decoder

    @staticmethod
    def check_config(args: "DiffusionDistributionConfig") -> None:
        """Raises `ValueError` for settings that contradict the estimator."""

    def check_rewards(self, images: Tensor, conditions: Conditions) -> None:
        """Tries the rewards on two uint8 images `(2, C, H, W)`; raises `ValueError` if they do not fit."""

    def draw_slots(self, sampler: SlotSampler | StratifiedSlotSampler) -> Tensor:
        """Draws the replaced places `(B, n)`; the `num_generations` subsets of a group replace the same places."""
        args, distinct = self.args, self.replaces_all or self.args.reference_update == "rolling"
        slots = sampler.draw(args.num_subsets // args.num_generations, args.replace_size, distinct)
        return slots.repeat_interleave(args.num_generations, dim=0)

    def compute_advantages(self, rewards: list[Tensor]) -> Tensor:
        """Advantages `(B, 1)` or `(B, n)`: of several rewards each is normalized first, so weights compare spreads."""
        args = self.args

        def normalize(values: Tensor) -> Tensor:
            return normalize_advantages(values, args.advantage_normalization, args.num_generations)

        total = self.rewards.total(rewards)
        if len(rewards) == 1:
            return normalize(total)
        return self.rewards.total([normalize(values).expand_as(total) for values in rewards])

    def select(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Indices `(M,)` of the selected images among those of all processes, ascending."""
        args = self.args
        shares = self.accelerator.num_processes if args.selection_scope == "local" else 1
        mask = select(advantages, args.selection, args.top_advantage_quantile, shares)
        self.trainer.record("advantage_kept", mask.double().mean().item())
        return mask.expand(rollout.slots.shape).flatten().nonzero().flatten()

    @torch.no_grad()
    def rollout(self, model: nn.Module, slots: Tensor, step: int) -> Rollout:
        """Generates new images for `slots` `(B, n)`, and keeps what `prepare` needs."""
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: list[Tensor]) -> Batch | None:
        """Makes a batch of rewards `(B, 1)` or `(B, n)`, one per function; `None` if there is nothing to learn."""
        raise NotImplementedError

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes this micro-batch's share of the loss, and values `(P,)` to log."""
        raise NotImplementedError

    def num_passes(self) -> int:
        """Passes of the network with gradients per update, over all processes."""
        raise NotImplementedError

    def num_selected(self) -> int:
        """Images that an update trains on, over all processes."""
        args, share = self.args, self.args.top_advantage_quantile
        shares = {"all": 1.0, "top": share, "top_bottom": min(1.0, 2 * share)}
        return round(args.num_subsets * shares[args.selection]) * args.replace_size

    def restore(self, state: State) -> Batch:
        """Rebuilds a batch from its `state_dict`."""
        raise NotImplementedError

    def state_dict(self) -> State:
        """State of the estimator's own, such as an old policy."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Takes back what `state_dict` returned."""
