# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Strata of prompts: groups that every draw is taken from in proportion, so that it keeps the prompts' distribution.

They are whatever a column of the dataset says, or clusters of text embeddings.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def members_of(strata: Sequence[Hashable]) -> list[Tensor]:
    """Places of each stratum's members, in the order in which strata first appear."""
    places: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        places.setdefault(plain(stratum), []).append(place)
    return [torch.tensor(members) for members in places.values()]


def plain(value: Any) -> Any:
    """A number that a dataset of format "torch" holds as a tensor, which would equal no other."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def proportional_counts(sizes: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """
    How many of `total` each stratum gives: its proportional share rounded up or down, and the share itself in
    expectation (systematic sampling).

    Args:
        sizes (`torch.LongTensor` of shape `(S,)`): members of each stratum.
        total (`int`): how many are drawn; may exceed the number of members.
        generator (`torch.Generator`): decides what is rounded up.

    Returns:
        `torch.LongTensor` of shape `(S,)`, whose sum is `total`.
    """
    everyone = int(sizes.sum())
    start = int(torch.randint(everyone, (1,), generator=generator))
    # drawn are the positions (k everyone + start) / total of all members in a row, k = 0 to total - 1
    before = (total * sizes.cumsum(0) - start + everyone - 1).div(everyone, rounding_mode="floor")
    return before.diff(prepend=before.new_zeros(1))


def proportional_subsets(sizes: Tensor, num_subsets: int, size: int, generator: torch.Generator) -> Tensor:
    """
    How many members of each stratum each of `num_subsets` subsets gets, `(B, S)`: its proportional share of `size`
    rounded up or down, in each subset; and likewise of all `B * size` in the subsets together.
    """
    total = num_subsets * size
    # one stratum after the other, dealt out like cards
    strata = torch.arange(len(sizes)).repeat_interleave(proportional_counts(sizes, total, generator))
    receivers = torch.randperm(num_subsets, generator=generator)[torch.arange(total) % num_subsets]
    counts = torch.zeros(num_subsets, len(sizes), dtype=torch.long)
    return counts.index_put_((receivers, strata), torch.ones(total, dtype=torch.long), accumulate=True)


def cluster_embeddings(embeddings: Tensor, num_clusters: int, seed: int = 0, max_iterations: int = 100) -> Tensor:
    """
    Clusters of rows by k-means: Lloyd's iterations from centres drawn by k-means++ (Arthur and Vassilvitskii, 2007).

    Args:
        embeddings (`torch.Tensor` of shape `(M, d)`): for example of prompts, [`~metrics.CLIPEmbeddings.prompts`].
        num_clusters (`int`): number of clusters; at most the number of different rows.
        seed (`int`, *optional*, defaults to 0): of the first centres.
        max_iterations (`int`, *optional*, defaults to 100): iterations at most; it ends when none changes.

    Returns:
        `torch.LongTensor` of shape `(M,)`: the cluster of each row, from 0 to `num_clusters - 1`; none is empty.

    Raises:
        ValueError: fewer different rows than clusters, or values that are not finite.
    """
    points = embeddings.detach().double().cpu()
    if points.ndim != 2 or not points.isfinite().all():
        raise ValueError(f"embeddings of shape {tuple(points.shape)} must be finite, one row (M, d) each.")
    different = len(points.unique(dim=0))
    if not 1 <= num_clusters <= different:
        raise ValueError(
            f"num_clusters={num_clusters} must lie in 1 to {different}, the number of different embeddings."
        )
    centres = _first_centres(points, num_clusters, torch.Generator().manual_seed(seed))
    clusters = torch.full((len(points),), -1)
    for _ in range(max_iterations):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, found = distances.min(dim=1)
        counts = found.bincount(minlength=num_clusters)
        for empty in (counts == 0).nonzero().flatten().tolist():
            # takes the farthest point of a cluster that keeps others
            farthest = torch.where(counts[found] > 1, nearest, -1.0).argmax()
            counts[found[farthest]] -= 1
            counts[empty], found[farthest], nearest[farthest] = 1, empty, 0.0
        if torch.equal(found, clusters):
            break
        clusters = found
        sums = torch.zeros_like(centres).index_add_(0, clusters, points)
        centres = sums / counts[:, None]
    return clusters


def _first_centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points, each drawn with probability proportional to its squared distance from those drawn before."""
    centres = [points[int(torch.randint(len(points), (1,), generator=generator))]]
    squared = (points - centres[0]).square().sum(dim=1)
    while len(centres) < count:
        centres.append(points[int(torch.multinomial(squared, 1, generator=generator))])
        squared = torch.minimum(squared, (points - centres[-1]).square().sum(dim=1))
    return torch.stack(centres)


def column_of(dataset: Any, column: str) -> list:
    """
    A column of a dataset or of a list of rows.

    Raises:
        ValueError: there is none of this name.
    """
    names = getattr(dataset, "column_names", None) or list(dataset[0])
    if column not in names:
        raise ValueError(f"the dataset has columns {names}, none of them {column!r}.")
    rows = dataset[column] if hasattr(dataset, "column_names") else [row[column] for row in dataset]
    return [plain(value) for value in rows]
