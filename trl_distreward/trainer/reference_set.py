# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The generated reference set that subsets are judged in: when it is made anew, and from what."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor

from ..conditions import conditions_of_slots, strata_of_slots
from ..policies import DiffusionPolicy
from ..rewards.slots import SlotSampler, StratifiedSlotSampler
from ..rewards.subset_replace import SubsetReplaceReward

logger = get_logger(__name__)


def conditions_and_slots(
    policy: DiffusionPolicy, dataset: Any, args: Any
) -> tuple[Any, SlotSampler | StratifiedSlotSampler]:
    """
    The conditions of a generated set, and what draws subsets of it; both in proportion over strata, if there are any.

    Args:
        policy ([`DiffusionPolicy`]): generator.
        dataset (`datasets.Dataset`, *optional*): conditions and strata.
        args ([`DiffusionTrainerConfig`]): size, seed and the strata's column.

    Raises:
        ValueError: no such columns, or conditions that the model does not know.
    """
    size, column = args.reference_set_size, args.stratify_by
    conditions = conditions_of_slots(policy, dataset, size, args.seed, column)
    if column is None:
        return conditions, SlotSampler(size, seed=args.seed)
    strata = strata_of_slots(dataset, column, size, args.seed, conditions)
    return conditions, StratifiedSlotSampler(strata, seed=args.seed)


class ReferenceSet:
    """
    Keeps the reference sets of all distribution rewards, which are features of the same images.

    Args:
        rewards (`Sequence[SubsetReplaceReward]`): whose reference set it is; may be empty.
        args ([`DiffusionDistributionConfig`]): how and when it is updated.
        accelerator (`accelerate.Accelerator`): gathers over processes.
    """

    def __init__(self, rewards: Sequence[SubsetReplaceReward], args: Any, accelerator: Accelerator):
        self.rewards = list(rewards)
        self.args = args
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Forgets when it was made, so that it is made anew."""
        self.last_refresh: int | None = None
        self.drifted = False

    @property
    def distances(self) -> dict[str, float]:
        """From real data, per feature space."""
        return {space: value for reward in self.rewards for space, value in reward.reference_distances.items()}

    def is_due(self, step: int) -> bool:
        """Whether it must be generated anew before the rollouts of optimizer step `step`."""
        if not self.rewards:
            return False
        if self.last_refresh is None:
            return True
        if self.args.reference_update == "rolling":
            return False
        if self.args.reference_refresh_steps == "auto":
            return self.drifted
        return step - self.last_refresh >= int(self.args.reference_refresh_steps)

    def refresh(self, batches: Iterable[tuple[Tensor, Any, int, Tensor]], step: int) -> None:
        """
        Takes newly generated images.

        Args:
            batches: this process's uint8 images, their conditions, how many rows of all processes' together count,
                and which samples are finite.
            step (`int`): optimizer step.

        Raises:
            ValueError: values are not finite, and there is no earlier set to keep.
        """
        features: list[dict[str, list[Tensor]]] = [{} for _ in self.rewards]
        for images, conditions, valid, finite in batches:
            for reward, spaces in zip(self.rewards, features, strict=True):
                for space, rows in reward.extract(images, conditions, check_finite=False).items():
                    rows = torch.where(finite[:, None], rows, torch.nan)
                    spaces.setdefault(space, []).append(self.accelerator.gather(rows)[:valid])
        joined = [{space: torch.cat(parts) for space, parts in spaces.items()} for spaces in features]
        bad = sum(int((~v.isfinite()).any(dim=1).sum()) for spaces in joined for v in spaces.values())
        if bad and self.last_refresh is not None:
            logger.warning(f"{bad} features of the new reference set are not finite: the old set stays.")
            return
        for reward, values in zip(self.rewards, joined, strict=True):
            reward.set_reference(values)  # the first set has no other to fall back on: it refuses bad values
        self.last_refresh, self.drifted = step, False

    def roll(self, slots: Tensor, features: Sequence[dict[str, Tensor]], generator: torch.Generator) -> None:
        """Leaves new images where they were judged; `features` are of all processes' images, per reward and space."""
        for reward, spaces in zip(self.rewards, features, strict=True):
            reward.update_reference(slots, spaces, generator)

    def watch_drift(self, rewards: Sequence[Tensor]) -> float | None:
        """
        How far rewards have moved, as a whole, from what the unchanged reference set would get, in their standard
        deviations: the largest over rewards, `None` without any.

        New images of the policy that made the reference set change its distance either way and little on average:
        what the mean reward differs by is the policy's change since then.
        """
        if not self.rewards:
            return None
        moved = [
            (values.mean() - reward.baseline).abs() / values.std().clamp(min=torch.finfo(values.dtype).tiny)
            for reward, values in zip(self.rewards, rewards, strict=True)
        ]
        # one process decides for all: a last bit of difference would part their ways
        drift = broadcast(torch.stack(moved).max()).item()
        self.drifted = drift > self.args.refresh_drift
        return drift

    def state_dict(self) -> dict[str, Any]:
        rewards = [reward.state_dict() for reward in self.rewards]
        return {"rewards": rewards, "last_refresh": self.last_refresh, "drifted": self.drifted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for reward, saved in zip(self.rewards, state["rewards"], strict=True):
            for values in saved["features"].values():
                if len(values) != self.args.reference_set_size:
                    raise ValueError(
                        f"the checkpoint's reference set has {len(values)} images, and reference_set_size="
                        f"{self.args.reference_set_size}: resume with the same number, or start a new run from the "
                        "checkpoint as its model."
                    )
            features = {space: values.to(self.accelerator.device) for space, values in saved["features"].items()}
            reward.load_state_dict({**saved, "features": features})
        self.last_refresh, self.drifted = state["last_refresh"], state["drifted"]
