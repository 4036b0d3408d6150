# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Base of the modules for Hugging Face `evaluate` under `metrics_hub`."""

from collections.abc import Iterable, Sequence

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from numpy.typing import ArrayLike
from torch import Tensor

INPUTS = """
Args:
    predictions (`list` or array of shape `(N, d)`): features of generated images, float32.
    references (`list` or array of shape `(M, d)`): features of real images, from the same extractor.
        The two sets need not have the same number of rows, and `add_batch` takes either of them alone.
"""


class FeatureModule(evaluate.Metric):
    """A metric between two sets, which `evaluate` keeps as columns of a table; the shorter is filled up."""

    def describe(self, description: str, inputs: str, citation: str) -> evaluate.MetricInfo:
        """Value of `_info`: both columns hold rows of float32."""
        row = ListOf(Value("float32"))
        info = evaluate.MetricInfo(
            description=description,
            citation=citation,
            inputs_description=INPUTS + inputs,
            features=Features({"predictions": row, "references": row}),
        )
        # without it every number becomes a Python object of 32 bytes; the constructor refuses it for rows of lists
        info.format = "numpy"
        return info

    def add_batch(
        self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None, **kwargs: str
    ) -> None:
        """Adds features of generated images, of real images, or of both, in any numbers."""
        sets = {"predictions": predictions, "references": references}
        rows = {name: [] if given is None else list(np.asarray(given, np.float32)) for name, given in sets.items()}
        longest = max(map(len, rows.values()))
        super().add_batch(**{name: [*own, *[[]] * (longest - len(own))] for name, own in rows.items()}, **kwargs)


def to_features(rows: Iterable[Sequence[float] | None], name: str) -> Tensor:
    """Features `(N, d)` of a column without the rows that fill it."""
    kept = [row for row in rows if row is not None and len(row)]
    if not kept:
        raise ValueError(f"there are no {name}: give features of shape (N, d) to add_batch or compute.")
    return torch.from_numpy(np.stack(kept).astype(np.float32, copy=False))
