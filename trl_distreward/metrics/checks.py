# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What distances ask of the features and rows they are given; a `ValueError` says which are at fault."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def check_features(features: Tensor, name: str = "features", dimension: int | None = None) -> Tensor:
    """Features as a finite float64 matrix (N, d), or a `ValueError` that says which rows are at fault."""
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name} must be a tensor of shape (N, d), got {shape}: flatten each image's features.")
    if dimension is not None and features.shape[1] != dimension:
        raise ValueError(
            f"{name} have dimension {features.shape[1]}, but the statistics they are compared with have "
            f"{dimension}: use the extractor that made the statistics."
        )
    if not features.isfinite().all():
        rows = (~features.isfinite()).any(dim=1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        raise ValueError(
            f"{name} have NaN or infinite values in {len(rows)} of {len(features)} rows ({shown}): "
            "check the images and run the extractor in float32."
        )
    return features.double()


def check_shape_and_values(features: Tensor, name: str, dimension: int | None = None) -> Tensor:
    """As `check_features`, but without a float64 copy of a set that may be gigabytes."""
    fine = isinstance(features, Tensor) and features.ndim == 2 and bool(features.isfinite().all())
    check_features(features[:1] if fine else features, name, dimension)
    return features


def check_fitted(features: Tensor | None, method: str) -> Tensor:
    """The reference set's features, or a `ValueError` that says what `method` waits for."""
    if features is None:
        raise ValueError(f"{method}() needs a reference set: call fit(features) first.")
    return features


def check_rows(indices: Tensor, count: int) -> Tensor:
    """Row numbers `(M,)` of a set of `count` rows, or a `ValueError`."""
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(indices.shape)} of {indices.dtype}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"indices are {given}: they must be whole numbers in a tensor of shape (M,).")
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise ValueError(f"indices span {indices.min()} to {indices.max()}: they must lie in 0 to {count - 1}.")
    return indices.long()


def check_replacement(indices: Tensor, features: Tensor, count: int, dimension: int) -> Tensor:
    """Validates one call of `replaced`; returns the features in float64."""
    if indices.ndim != 2 or features.shape[:2] != indices.shape or features.ndim != 3:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)} and features {tuple(features.shape)}: "
            "they must be (B, n) and (B, n, d)."
        )
    if indices.shape[1] >= count:
        raise ValueError(
            f"replace_size={indices.shape[1]} is not smaller than the reference set of {count}: replace fewer images."
        )
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(f"indices span {indices.min()} to {indices.max()}: they must lie in 0 to {count - 1}.")
    ordered = indices.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("a subset names the same row twice: the rows of one subset must be distinct.")
    flat = check_features(features.flatten(0, 1), "new features", dimension)
    return flat.view(features.shape)


def load_real_features(real: Any, distance: str) -> Tensor:
    """
    Real features `(M, d)` given as a tensor or as the path of a `.safetensors` file that holds `"features"`.

    Raises:
        TypeError: `real` is something else, for instance [`FeatureStatistics`].
        FileNotFoundError: there is no such file.
        ValueError: the file holds no features or is damaged; the features have a wrong shape, NaN or infinite values.
    """
    needs = f"{distance} compares with the real features themselves, of shape (M, d), not with their moments"
    if isinstance(real, str | os.PathLike):
        path = Path(real)
        if not path.is_file():
            raise FileNotFoundError(f"no features file at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                loaded = file.get_tensor("features") if "features" in names else None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a .safetensors file: {error}") from error
        if loaded is None:
            raise ValueError(
                f"{path} holds {names} and no 'features', but {needs}: save the features under that name."
            )
        real = loaded
    if not isinstance(real, Tensor):
        raise TypeError(f"real_features is a {type(real).__name__}, but {needs}: pass a tensor or a path.")
    return check_shape_and_values(real, "real features").detach()
