# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""How much a metric of a generated set would differ had other images been drawn."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm


def half_sample_spread(
    metric: Callable[[Tensor], Mapping[str, float]],
    count: int,
    repeats: int = 20,
    *,
    fraction: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """
    Standard deviations of metrics of a set, from random halves of it (the delete-d jackknife of Shao and Wu, Annals of
    Statistics 17, 1989, with subsets drawn at random).

    With m of N rows, drawn without replacement, the variance between subsets is (N - m) / m of that between
    independent sets of N, to first order; the result is corrected for it, and with halves there is nothing to correct.
    A bootstrap would draw rows twice, and a copy is its own nearest neighbour and lowers the rank of a covariance:
    precision, recall, density, coverage and Fréchet distances of it are not those of a set of images.

    Args:
        metric (`Callable`): row numbers `(m,)` to named values; what it is compared with stays as it is.
        count (`int`): N.
        repeats (`int`, *optional*, defaults to 20): number of subsets, from 2; the result itself is known to about
            `1 / sqrt(2 repeats)` of itself.
        fraction (`float`, *optional*, defaults to 0.5): m / N.
        seed (`int`, *optional*, defaults to 0): of the subsets.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        `dict[str, float]`: a standard deviation under each name.

    Raises:
        ValueError: `repeats` or `fraction` is out of range, or a subset would have fewer than 2 rows.
    """
    if int(repeats) != repeats or repeats < 2:
        raise ValueError(f"repeats={repeats} must be a whole number from 2: one value has no spread.")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1: 0.5 needs no correction.")
    size = round(fraction * count)
    if not 2 <= size < count:
        raise ValueError(f"fraction={fraction} of {count} rows is {size}: subsets need at least 2 rows, and not all.")
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, list[float]] = {}
    for _ in tqdm(range(repeats), disable=not progress, unit="subset", desc="spread"):
        rows = torch.randperm(count, generator=generator)[:size]
        for name, value in metric(rows).items():
            values.setdefault(name, []).append(float(value))
    correction = math.sqrt(size / (count - size))
    return {name: correction * torch.tensor(each, dtype=torch.float64).std().item() for name, each in values.items()}
