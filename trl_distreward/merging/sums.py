# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Weighted sums of tensors at the speed of reading them."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements summed at a time on the CPU. A block of the sum stays in a core's cache (0.5 MiB in float32) while every
# member is added to it, and so is written once; smaller ones cost more in calls (benchmarks/merge.py).
BLOCK = 1 << 17


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums of this dtype are made."""
    return dtype if dtype in (torch.float64, torch.complex64) else torch.float32


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    """
    `sum_i weights[i] * tensors[i]`, in the dtype of `out`.

    A member of weight 0 is not read, so that one checkpoint alone comes out bit by bit.

    Args:
        tensors (`list[torch.Tensor]`): contiguous, of one shape, on the device of `out`.
        weights (`list[float]`): one each.
        out (`torch.Tensor`): contiguous, of that shape; overwritten.

    Returns:
        `torch.Tensor`: `out`.
    """
    used = [(tensor.view(-1), weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if not used:
        return out.zero_()
    size = BLOCK if out.device.type == "cpu" else max(1, out.numel())
    scales = [weight for _, weight in used]
    for block, *parts in zip(out.view(-1).split(size), *(tensor.split(size) for tensor, _ in used), strict=True):
        torch.mul(parts[0].to(block.dtype), scales[0], out=block)
        for part, weight in zip(parts[1:], scales[1:], strict=True):
            block.add_(part.to(block.dtype), alpha=weight)
    return out
