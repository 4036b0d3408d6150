# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics files of other tools, and whether a file's statistics are those of an extractor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .npz import DAMAGES, array_names, open_archive, read_array
from .numpy_pickle import load_numpy_pickle

# names of feature spaces in EDM2's files, and of ADM's spatial features, as this library calls them
_EDM2_EXTRACTORS = {"fid": "inception", "fd_dinov2": "dinov2"}
SPATIAL = "inception-spatial"


@dataclass
class Moments:
    """A mean `(d,)` and a covariance `(d, d)` from a file, and what the file says of them."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def read_npz_moments(path: Path, extractor: str | None = None) -> Moments:
    """
    Moments from an `.npz` with arrays `mu` and `sigma`, as pytorch-fid, clean-fid, ADM, DiT, MAR and EDM write them.

    ADM's reference batches hold `mu_s` and `sigma_s` of spatial features as well, which are read for the extractor
    `"inception-spatial"`.
    """
    names = ("mu_s", "sigma_s") if extractor == SPATIAL else ("mu", "sigma")
    with open_archive(path) as archive:
        held = array_names(archive)
        if not set(names) <= set(held):
            also = " It holds images: give it as a source of images." if "arr_0" in held else ""
            raise ValueError(f"{path} holds {held}: a statistics file holds {names[0]!r} and {names[1]!r}.{also}")
        try:
            mean, covariance = (read_array(archive, name) for name in names)
        except DAMAGES as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
    return _moments(path, mean, covariance, metadata={"extractor": SPATIAL} if extractor == SPATIAL else {})


def read_edm2_moments(path: Path, extractor: str | None = None) -> Moments:
    """Moments from an EDM2 `.pkl`, which holds them for several extractors; by a reader that runs nothing."""
    content = load_numpy_pickle(path)
    content = content if isinstance(content, dict) else {}
    held = {name: content[key] for key, name in _EDM2_EXTRACTORS.items() if key in content}
    if not held:
        raise ValueError(f"{path} holds no statistics: an EDM2 file holds 'fid' or 'fd_dinov2', each a mu and sigma.")
    if extractor is None and len(held) > 1:
        raise ValueError(
            f"{path} holds statistics of {', '.join(held)}: say which, as feature_extractor={[*held][0]!r}."
        )
    name = extractor or next(iter(held))
    if name not in held:
        raise ValueError(f"{path} holds statistics of {', '.join(held)}, not of {name!r}: compute those of {name!r}.")
    entry, count = held[name], content.get("num_images")
    if not isinstance(entry, dict) or not {"mu", "sigma"} <= set(entry):
        raise ValueError(f"{path} holds no mu and sigma for {name!r}: it is not a statistics file of EDM2.")
    return _moments(path, entry["mu"], entry["sigma"], count, {"extractor": name})


def _moments(
    path: Path, mean: object, covariance: object, count: object = None, metadata: Mapping[str, str] | None = None
) -> Moments:
    if count is not None and not isinstance(count, int):
        raise ValueError(f"num_images={count!r} in {path} must be a whole number.")
    tensors = [_tensor(array, f"{name} in {path}") for name, array in (("mu", mean), ("sigma", covariance))]
    return Moments(tensors[0], tensors[1], count, {"source": path.name, **(metadata or {})})


def _tensor(array: object, name: str) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {kind}: it must be an array of floating-point numbers.")
    return torch.from_numpy(array.astype(np.float64))


def check_extractor(
    metadata: Mapping[str, str],
    dimension: int,
    *,
    extractor: str,
    resize: str | None = None,
    weights: str | None = None,
    extractor_dimension: int | None = None,
    path: object = "the statistics",
) -> None:
    """
    Raises `ValueError` where statistics with this `metadata` were not made by this extractor.

    Files of other tools do not name their extractor: only their dimension can be checked.

    Args:
        metadata (`dict[str, str]`), dimension (`int`): of the statistics.
        extractor (`str`), resize (`str`, *optional*), extractor_dimension (`int`, *optional*): of the extractor.
        weights (`str`, *optional*): digest of its network, as [`~metrics.digest.network_digest`] gives it.
        path: named in the message.
    """
    remedy = f"recompute them with trl-distreward statistics {_as_option(extractor, resize)}"
    for name, value in (("extractor", extractor), ("resize", resize), ("weights", weights)):
        held = metadata.get(name)
        if held and value and held != value:
            raise ValueError(
                f"{path} has {name} {held!r}, but the images are seen with {value!r}: features of one cannot be "
                f"compared with those of the other: {remedy}."
            )
    if extractor_dimension is not None and dimension != extractor_dimension:
        raise ValueError(
            f"{path} has dimension {dimension}, but {extractor!r} gives {extractor_dimension}: they must be the same: "
            f"{remedy}."
        )


def _as_option(extractor: str, resize: str | None) -> str:
    """How an extractor is named on the command line; those of which more would have to be said are not spelt out."""
    name, _, output = extractor.partition("-")
    if name != "inception":
        return "and the --feature-extractor of the images, its options included"
    options = {"output": output, "resize": "" if resize in (None, "tensorflow") else resize}
    return ",".join(["--feature-extractor inception", *(f"{key}={value}" for key, value in options.items() if value)])
