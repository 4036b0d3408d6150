# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Conditions of images: class labels or prompts, where they come from, and strata to keep their shares."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .seeds import keyed_generator

if TYPE_CHECKING:
    from .policies import DiffusionPolicy

Conditions = Tensor | Sequence[str | int]  # class labels or prompts
Rows: TypeAlias = Dataset | Sequence[Mapping[str, object]]
EvalRows = Rows | Mapping[str, Rows]  # several datasets by name

LABEL_COLUMNS = ("label", "labels", "class_label", "class_labels")
TEXT_COLUMNS = ("prompt", "prompts", "text", "caption")


def take(conditions: Conditions, indices: Tensor | Iterable[int]) -> Conditions:
    """Selects rows of a tensor or a list."""
    if isinstance(conditions, Tensor):
        rows = indices if isinstance(indices, Tensor) else torch.as_tensor(list(indices), dtype=torch.long)
        return conditions[rows.to(conditions.device)]
    return [conditions[int(i)] for i in indices]


def as_arguments(conditions: Conditions | None, device: torch.device) -> dict[str, Tensor | list]:
    """The keyword argument by which reward functions get conditions: `labels`, on `device`, or `prompts`."""
    if conditions is None:
        return {}
    return {"labels": conditions.to(device)} if isinstance(conditions, Tensor) else {"prompts": list(conditions)}


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Repeats all labels to `count`; the last round spreads over them, as neighbours are alike in ImageNet."""
    rounds, rest = divmod(count, num_classes)
    last = torch.arange(rest) * num_classes // max(rest, 1)
    return torch.cat([torch.arange(num_classes).repeat(rounds), last])


def as_rows(dataset: Rows | IterableDataset | None, most: int) -> Rows | None:
    """Reads a stream's first `most` rows, and gives rows that would be tables in Python's types; others stay."""
    if isinstance(dataset, IterableDataset):
        return list(dataset.with_format(None).take(most))
    if isinstance(dataset, Dataset) and dataset.format["type"] in ("arrow", "pandas", "polars"):
        return dataset.with_format(None)
    return dataset


def column_names(dataset: Rows) -> list[str]:
    """Columns of a dataset or of a list of rows; `ValueError` says what to pass instead of anything else."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, Mapping):
        raise ValueError(f"the dataset has splits: pass one of them, dataset[{next(iter(names))!r}].")
    if not hasattr(dataset, "__len__") or isinstance(dataset, str):
        raise ValueError(f"the dataset is a {type(dataset).__name__}: pass a datasets.Dataset, which has a length.")
    if not len(dataset):
        raise ValueError("the dataset is empty: pass one with at least one row.")
    if names is None and not isinstance(dataset[0], Mapping):
        kind = type(dataset[0]).__name__
        raise ValueError(f"the dataset is a list of {kind}: pass a Dataset, Dataset.from_dict({{'prompt': [...]}}).")
    return list(dataset[0]) if names is None else names


def column_of(dataset: Rows, column: str) -> list:
    """A column of a dataset or of a list of rows, or `ValueError` if there is none."""
    names = column_names(dataset)
    if column not in names:
        raise ValueError(f"the dataset has no column {column!r}: it has {', '.join(names)}.")
    rows = dataset[column] if hasattr(dataset, "column_names") else [row[column] for row in dataset]  # type: ignore[call-overload]
    return [plain(value) for value in rows]


def find_column(names: Sequence[str], wanted: Sequence[str], kind: str) -> str:
    """The one of a dataset's columns that has one of the `wanted` names; `kind` is for the message."""
    found = [name for name in names if name in wanted]
    if len(found) != 1:
        held = f"has the columns {', '.join(found)}, each of which" if found else f"({', '.join(names)}) has none that"
        remedy = "keep one, by remove_columns" if found else f"rename one to {wanted[0]!r}, by rename_column"
        raise ValueError(f"the dataset {held} may hold {kind} (any of {', '.join(wanted)}): {remedy}.")
    return found[0]


def read_labels(rows: list, column: str) -> Tensor:
    """Class labels `(N,)` of a column."""
    try:
        labels = torch.as_tensor(rows)
        if labels.is_floating_point():
            raise ValueError("labels are floats")
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = f"use dataset.class_encode_column({column!r})"
        raise ValueError(f"column {column!r} holds {rows[0]!r}: labels are integers 0…K−1; {remedy}.") from error
    return labels


def plain(value: object) -> Hashable:
    """Turns a tensor without dimensions, which torch-formatted datasets hold, into a number that can be a key."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def members_of(strata: Sequence[Hashable]) -> list[Tensor]:
    """Positions of each stratum's members, strata in the order of their first appearance."""
    places: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        places.setdefault(plain(stratum), []).append(place)
    return [torch.tensor(members) for members in places.values()]


def proportional_counts(sizes: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """Shares `total` draws out among strata of `sizes` `(S,)`, rounded up or down at random: counts `(S,)`."""
    everyone = int(sizes.sum())
    start = int(torch.randint(everyone, (1,), generator=generator))
    # draws the positions (k everyone + start) / total of all members in a row, k = 0 to total - 1
    before = (total * sizes.cumsum(0) - start + everyone - 1).div(everyone, rounding_mode="floor")
    return before.diff(prepend=before.new_zeros(1))


def proportional_subsets(sizes: Tensor, num_subsets: int, size: int, generator: torch.Generator) -> Tensor:
    """Counts `(B, S)` of draws per subset and stratum, proportional in each subset and in all subsets together."""
    total = num_subsets * size
    # one stratum after the other, dealt out like cards
    strata = torch.arange(len(sizes)).repeat_interleave(proportional_counts(sizes, total, generator))
    receivers = torch.randperm(num_subsets, generator=generator)[torch.arange(total) % num_subsets]
    pairs = receivers * len(sizes) + strata
    return torch.bincount(pairs, minlength=num_subsets * len(sizes)).view(num_subsets, len(sizes))


def rows_of_slots(num_rows: int, count: int, seed: int, strata: Sequence[Hashable] | None = None) -> Tensor:
    """Deals rows to `count` slots in shuffled rounds; the incomplete last one has each stratum's share."""
    generator = keyed_generator(seed, "rows")
    rounds = [torch.randperm(num_rows, generator=generator) for _ in range(math.ceil(count / num_rows))]
    rest = count % num_rows
    if strata is not None and rest:
        members = members_of(strata)
        counts = proportional_counts(torch.tensor([len(m) for m in members]), rest, generator).tolist()
        place = torch.empty(num_rows, dtype=torch.long).scatter_(0, rounds[-1], torch.arange(num_rows))
        # the first rows of each stratum in the shuffled order
        chosen = [m[place[m].argsort()[:wanted]] for m, wanted in zip(members, counts, strict=True)]
        rounds[-1] = torch.cat(chosen)
    return torch.cat(rounds)[:count]


def dealt_rows(dataset: Rows, count: int, seed: int, stratify_by: str | None) -> Tensor:
    """The row of a dataset for each of `count` slots, see [`rows_of_slots`]; `stratify_by` is a column of strata."""
    strata = None if stratify_by is None else column_of(dataset, stratify_by)
    return rows_of_slots(len(dataset), count, seed, strata)


def strata_of_slots(dataset: Rows | None, column: str, count: int, seed: int, labels: Conditions) -> list[Hashable]:
    """The stratum of each of `count` slots: a column of the dataset, or the slot's class if there is no dataset."""
    if dataset is None:
        if not isinstance(labels, Tensor) or column not in LABEL_COLUMNS:
            raise ValueError(f"stratify_by={column!r} needs a train_dataset with that column: pass one.")
        return labels.tolist()
    strata = column_of(dataset, column)
    return [strata[row] for row in dealt_rows(dataset, count, seed, column).tolist()]


def conditions_of_slots(
    policy: "DiffusionPolicy", dataset: Rows | None, count: int, seed: int, stratify_by: str | None = None
) -> Conditions:
    """Conditions of `count` slots: the dataset's labels or prompts, or without one all classes in balance."""
    classes = policy.num_conditions
    prompts = classes is None
    if dataset is None:
        if classes is None:
            raise ValueError("this model is conditioned on prompts: pass a train_dataset with a column 'prompt'.")
        return balanced_labels(count, classes)
    wanted, kind = (TEXT_COLUMNS, "prompts") if prompts else (LABEL_COLUMNS, "class labels")
    column = find_column(column_names(dataset), wanted, kind)
    rows = column_of(dataset, column)
    conditions = rows if prompts else read_labels(rows, column)
    policy.check_conditions(conditions)
    return take(conditions, dealt_rows(dataset, count, seed, stratify_by))
