# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Checks of the features and rows that distances and metrics are given."""

import torch
from torch import Tensor


def check_features(features: Tensor, name: str = "features", dimension: int | None = None, least: int = 0) -> Tensor:
    """Returns `features`; raises `ValueError` unless they are finite, of shape `(N, dimension)` and N ≥ `least`."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) < least:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        more = f", N at least {least}" if least else ""
        raise ValueError(f"{name} must be a tensor of shape (N, d){more}, got {shape}: give one row per image.")
    if dimension is not None and features.shape[1] != dimension:
        widths = f"dimension {features.shape[1]}, but the statistics they are compared with have {dimension}"
        raise ValueError(f"{name} have {widths}: use the extractor that made the statistics.")
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        rows = f"{bad.sum()} of {len(features)} rows"
        raise ValueError(f"{name} have NaN or infinite values in {rows}: check the images, and extract in float32.")
    return features


def check_replacement(indices: Tensor, features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows `(B, n)` and features `(B, n, d)`, float64, on the reference set's device, if they fit it."""
    if indices.ndim != 2 or features.shape[:2] != indices.shape or features.ndim != 3:
        shapes = f"indices have shape {tuple(indices.shape)} and features {tuple(features.shape)}"
        raise ValueError(f"{shapes}: they must be (B, n) and (B, n, d).")
    ordered = indices.sort(dim=1).values
    if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= len(reference):
        raise ValueError(f"indices span {indices.min()} to {indices.max()}: they must be 0 to {len(reference) - 1}.")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("a subset names the same row twice: the rows of one subset must be distinct.")
    check_features(features.flatten(0, 1), "new features", reference.shape[1])
    return indices.to(reference.device), features.to(reference.device, torch.float64)
