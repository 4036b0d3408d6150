# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Reward functions of a trainer: named, weighted, and split into distribution rewards and rewards of single images."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerState
from trl.trainer.utils import get_callable_name

from ..conditions import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    Conditions,
    Rows,
    as_arguments,
    column_names,
    dealt_rows,
    plain,
)
from ..evaluation.image_metrics import ImageMetric
from ..files import State
from ..metrics.extractors import describe_extractor, module_of
from ..metrics.image_scores import RewardFunction, score_images
from ..rewards.subset_replace import SubsetReplaceReward
from .advantages import normalize_advantages

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

_RESERVED = ("images", "prompts", "labels", "slots", "trainer_state", "log_metric", "log_extra")
_WATCHED = 3  # updates
Features = dict[str, Tensor]  # (K, d) by feature space


@dataclass(frozen=True)
class Reward:
    """One reward function."""

    name: str  # in the logs
    function: Any
    weight: float
    index: int  # among the functions of its kind
    of_sets: bool  # whether it is a `SubsetReplaceReward`


class RewardFunctions:
    """All reward functions of a trainer (`all`): distribution rewards (`of_sets`), others by name (`single`)."""

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None):
        listed = list(functions) if isinstance(functions, list | tuple) else [functions]
        for function in listed or [None]:
            if isinstance(function, type) or not callable(function):
                remedy = "pass a SubsetReplaceReward, or a function of images that returns one number per image"
                raise ValueError(f"reward_funcs holds {function!r:.90}: {remedy}.")
        weights = [1.0] * len(listed) if weights is None else weights
        if len(weights) != len(listed):
            raise ValueError(f"reward_weights: {len(weights)} for {len(listed)} reward functions, give one each.")
        self.all: list[Reward] = []
        names = [get_callable_name(function) for function in listed]
        for i, (function, weight) in enumerate(zip(listed, weights, strict=True)):
            earlier, of_sets = names[:i].count(names[i]), isinstance(function, SubsetReplaceReward)
            name = f"{names[i]}_{earlier + 1}" if earlier else names[i]  # score, score_2, …
            index = sum(reward.of_sets == of_sets for reward in self.all)
            self.all.append(Reward(name, function, weight, index, of_sets))
        self.of_sets: list[SubsetReplaceReward] = [reward.function for reward in self.all if reward.of_sets]
        spaces = [space for reward in self.of_sets for space in reward.extractors]
        if len(set(spaces)) < len(spaces):
            raise ValueError(f"feature spaces {spaces} share names: pass extractors as dictionaries of other names.")
        self.single = {reward.name: reward.function for reward in self.all if not reward.of_sets}
        self.extra_columns: dict[str, list] = {}
        self._columns: list[str] = []
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._watched: list[Sequence[Tensor]] = []

    def read_columns(self, trainer: "DiffusionTrainer", dataset: Rows | None) -> None:
        """Finds the columns that functions of single images get, and the row of each slot."""
        if dataset is None or not self.single:
            return
        conditions = TEXT_COLUMNS if trainer.policy.num_conditions is None else LABEL_COLUMNS
        self._columns = [name for name in column_names(dataset) if name not in conditions]
        for name in self._columns:
            if name in _RESERVED:
                raise ValueError(f"the dataset's column {name!r} is an argument of rewards: use rename_column.")
        args = trainer.args
        self._dataset = dataset
        self._rows = dealt_rows(dataset, args.reference_set_size, args.seed, args.stratify_by)

    def arguments(self, conditions: Conditions, slots: Tensor, trainer_state: TrainerState) -> dict[str, object]:
        """Keyword arguments of functions of single images, beside `images`; named as TRL's."""
        rows = [self._dataset[int(row)] for row in self._rows[slots.cpu()]] if self._columns else []
        return {
            **as_arguments(conditions, slots.device),
            "slots": slots,
            **{name: [row[name] for row in rows] for name in self._columns},
            "trainer_state": trainer_state,
            "log_metric": lambda name, value: self._metrics[name].append(float(value)),
            "log_extra": lambda column, values: self.extra_columns.update({column: list(values)}),
        }

    def score_images(
        self, images: Tensor, conditions: Conditions, slots: Tensor, trainer_state: TrainerState
    ) -> Tensor:
        """Scores `(functions, K)` of images `(K, C, H, W)` by the functions of single images; NaN for abstentions."""
        scores = torch.stack(score_images(self.single, images, **self.arguments(conditions, slots, trainer_state)))
        silent = scores.isnan().all(dim=0).nonzero().flatten().tolist()
        if silent and not self.of_sets:
            image = f"the image of slot {slots[silent[0]]}, {plain(conditions[silent[0]])!r}"
            raise ValueError(f"all reward functions returned None for {image}: let one return a number.")
        return scores

    def record_metrics(self, trainer: "DiffusionTrainer") -> None:
        """Records means over all processes of what functions passed to `log_metric`."""
        for name in sorted(set(gather_object(list(self._metrics)))) if self.single else ():
            values = self._metrics.pop(name, [])
            sums = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=trainer.accelerator.device)
            total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
            trainer.record(name, total / count)

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """Weighted sum over functions. Of single images, those that abstain (NaN) do not count; NaN if all do."""
        total, silent = torch.zeros(()), torch.ones((), dtype=torch.bool)
        for reward, value in zip(self.all, values, strict=True):
            abstains = value.isnan() & (not reward.of_sets)
            total = total + torch.where(abstains, 0.0, reward.weight * value)
            silent = silent & abstains
        return torch.where(silent, torch.nan, total)

    def watch(self, rewards: Sequence[Tensor]) -> None:
        """Warns once, after the first updates, of functions whose rewards `(B, k)` do not differ."""
        if len(self._watched) == _WATCHED:
            return
        self._watched.append(rewards)
        if len(self._watched) < _WATCHED:
            return
        for reward, *seen in zip(self.all, *self._watched, strict=True):
            alike = all(values.numel() > 1 and not normalize_advantages(values).any() for values in seen)
            if alike or all(torch.equal(values, seen[0]) for values in seen):
                kind = "equal" if alike else "the same"
                found = f"The first {_WATCHED} updates had {kind} rewards by {reward.name!r}"
                logger.warning(f"{found}: nothing can be learned from them. It may ignore the images, or round.")

    def rows(self) -> list:
        """Lists the values of the dataset's other columns for each slot; empty if no function gets them."""
        rows = (self._dataset[int(row)] for row in self._rows) if self._columns else ()
        return [[row[name] for name in self._columns] for row in rows]

    def describe(self) -> State:
        """Describes each function: two runs with other descriptions learn other things."""
        described: State = {"reward_funcs": [reward.name for reward in self.all]}
        for reward in self.all:
            about = reward.function.describe() if reward.of_sets else describe_extractor(reward.function)
            described |= {f"{reward.name}.{name}": value for name, value in {"weight": reward.weight, **about}.items()}
        return described

    def to(self, device: torch.device) -> None:
        """Moves the networks behind all functions."""
        for reward in self.all:
            module = reward.function if reward.of_sets else module_of(reward.function)
            if module is not None:
                module.to(device)

    def reset(self) -> None:
        """Forgets the reference sets and values of an earlier run."""
        self._metrics.clear()
        self._watched.clear()
        for reward in self.of_sets:
            reward.reset()

    def metrics(self) -> dict[str, ImageMetric]:
        """The distances of the distribution rewards, as metrics for evaluation."""
        return {f"distance_{space}": metric for reward in self.of_sets for space, metric in reward.metrics().items()}


def joined(join: Callable[[list[Tensor]], Tensor], parts: Sequence[list[Features]]) -> list[Features]:
    """Joins features `(K, d)` that several parts have per distribution reward and feature space."""
    rewards = zip(*parts, strict=True)
    return [{space: join([part[space] for part in group]) for space in group[0]} for group in rewards]
