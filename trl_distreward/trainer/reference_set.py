# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The generated reference set that subsets are judged in, and when it is generated anew."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor

from ..conditions import Conditions, EvalRows, Rows, as_rows, conditions_of_slots, strata_of_slots
from ..files import State
from ..policies import DiffusionPolicy
from ..rewards.slots import SlotSampler, StratifiedSlotSampler
from ..rewards.subset_replace import SubsetReplaceReward
from .image_sets import ImageBatch
from .reward_functions import joined

if TYPE_CHECKING:
    from .base_config import DiffusionTrainerConfig
    from .diffusion_distribution_config import DiffusionDistributionConfig

logger = get_logger(__name__)


def conditions_and_slots(
    policy: DiffusionPolicy, dataset: Rows | None, args: "DiffusionTrainerConfig"
) -> tuple[Conditions, SlotSampler | StratifiedSlotSampler]:
    """Conditions of a generated set, and the sampler of its subsets; both keep the shares of strata."""
    size, column = args.reference_set_size, args.stratify_by
    conditions = conditions_of_slots(policy, dataset, size, args.seed, column)
    if column is None:
        return conditions, SlotSampler(size, seed=args.seed)
    strata = strata_of_slots(dataset, column, size, args.seed, conditions)
    return conditions, StratifiedSlotSampler(strata, seed=args.seed)


def evaluated_conditions(
    policy: DiffusionPolicy, dataset: EvalRows | None, args: "DiffusionTrainerConfig", default: int | None = None
) -> dict[str, Conditions]:
    """Conditions to evaluate by prefix of their metrics: `"NAME_"` of each of several datasets, else `""`."""
    datasets = {f"{name}_": each for name, each in dataset.items()} if isinstance(dataset, Mapping) else {"": dataset}
    evaluated = {}
    for prefix, each in datasets.items():
        rows = as_rows(each, args.num_eval_images or args.reference_set_size)
        count = args.num_eval_images or default or len(rows or ())
        evaluated[prefix] = conditions_of_slots(policy, rows, count, args.eval_seed)
    return evaluated


class ReferenceSet:
    """The reference sets of all distribution rewards: features of the same generated images."""

    def __init__(
        self, rewards: Sequence[SubsetReplaceReward], args: "DiffusionDistributionConfig", accelerator: Accelerator
    ):
        self.rewards, self.args, self.accelerator = rewards, args, accelerator
        self.reset()

    def reset(self) -> None:
        """Forgets the last refresh, so that the set is generated anew."""
        self.last_refresh: int | None = None
        self.drifted = False

    @property
    def distances(self) -> dict[str, float]:
        """Distance from real data, per feature space."""
        return {space: value for reward in self.rewards for space, value in reward.reference_distances.items()}

    def is_due(self, step: int) -> bool:
        """Whether the set must be generated anew before the rollout of optimizer step `step`."""
        if not self.rewards or self.last_refresh is None:
            return bool(self.rewards)
        if self.args.reference_update == "rolling":
            return False
        if self.args.reference_refresh_steps == "auto":
            return self.drifted
        return step - self.last_refresh >= int(self.args.reference_refresh_steps)

    def refresh(self, batches: Iterable[ImageBatch], step: int) -> None:
        """Takes the images of [`~trainer.image_sets.shared_images`]; keeps the old set if values are not finite."""
        chunks = []
        for images, conditions, valid, finite in batches:
            found = [reward.extract(images, conditions, check_finite=False) for reward in self.rewards]
            marked = [{k: torch.where(finite[:, None], rows, torch.nan) for k, rows in each.items()} for each in found]
            chunks.append([{k: self.accelerator.gather(rows)[:valid] for k, rows in each.items()} for each in marked])
        features = joined(torch.cat, chunks)
        bad = sum(int((~rows.isfinite()).any(dim=1).sum()) for spaces in features for rows in spaces.values())
        if bad and self.last_refresh is not None:
            logger.warning(f"{bad} features of the new reference set are not finite: the old set stays.")
            return
        for reward, values in zip(self.rewards, features, strict=True):
            reward.set_reference(values)  # refuses values that are not finite
        self.last_refresh, self.drifted = step, False

    def watch_drift(self, rewards: Sequence[Tensor]) -> float:
        """Estimates from an update's rewards how far the distance would move, relatively, if all were new."""
        size, moved = self.args.reference_set_size, []
        for reward, values in zip(self.rewards, rewards, strict=True):
            replaced = 1 if reward.credit == "leave_one_in" else self.args.replace_size
            change = (values.mean() - reward.baseline).abs() * size / replaced
            moved.append(change / abs(reward.weighted_distance))
        # One process decides for all: they might differ in the last bit.
        drift = broadcast(torch.stack(moved).max()).item()
        self.drifted = drift > self.args.refresh_drift
        return drift

    def state_dict(self) -> State:
        rewards = [reward.state_dict() for reward in self.rewards]
        return {"rewards": rewards, "last_refresh": self.last_refresh, "drifted": self.drifted}

    def load_state_dict(self, state: State) -> None:
        for reward, saved in zip(self.rewards, state["rewards"], strict=True):
            features = {space: values.to(self.accelerator.device) for space, values in saved["features"].items()}
            reward.load_state_dict({**saved, "features": features})
        self.last_refresh, self.drifted = state["last_refresh"], state["drifted"]
