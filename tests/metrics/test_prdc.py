# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from tests.runs import calls_of
from trl_distreward.metrics import prdc
from trl_distreward.metrics.prdc import precision_recall_density_coverage


def by_definition(real, generated, k, precision_recall_k=None):
    """From whole matrices in float64, rounded as in scikit-learn."""
    compared = np.float32 if real.dtype == generated.dtype == torch.float32 else np.float64
    x, y = real.double().numpy(), generated.double().numpy()

    def distances(a, b):
        squares = np.stack([((b - row) ** 2).sum(axis=1) for row in a])
        return np.sqrt(squares.astype(compared))

    def radii(a, k):
        others = distances(a, a)
        np.fill_diagonal(others, np.inf)
        return np.sort(others, axis=1)[:, k - 1]

    between, other_k = distances(x, y), precision_recall_k or k
    within = between < radii(x, k)[:, None]
    return {
        "precision": (between < radii(x, other_k)[:, None]).any(axis=0).mean(),
        "recall": (between < radii(y, other_k)).any(axis=1).mean(),
        "density": within.sum() / (k * len(y)),
        "coverage": within.any(axis=1).mean(),
    }


def normal(count, dimension, seed=0, dtype=torch.float32):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[2_048, 64], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(prdc, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dimension", [2, 40])
def test_equals_the_definition(block, dtype, dimension):
    real, generated = normal(300, dimension, 1, dtype), 0.9 * normal(230, dimension, 2, dtype) + 0.1
    values = precision_recall_density_coverage(real, generated, 5, precision_recall_k=3)
    assert values == pytest.approx(by_definition(real, generated, 5, 3), abs=1e-12)


@pytest.mark.parametrize(
    ("real", "generated"),
    [
        (normal(300, 6).round(), normal(250, 6, 1).round()),  # a grid: most distances are tied
        (normal(300, 8), normal(300, 8)),  # the same set twice
        (normal(200, 8), normal(200, 8)[:50].repeat(4, 1)),  # copies of real rows
        (normal(200, 8), normal(1, 8, 3).repeat(200, 1)),  # one image over and over
        (torch.full((40, 5), 0.3), torch.full((30, 5), 0.3)),  # constant features
        (normal(6, 3), normal(6, 3, 1)),  # one row more than neighbours
        (1e12 * normal(200, 8) + 3e12, 1e12 * normal(200, 8, 1) + 3e12),
        (1e-18 * normal(200, 8), 1e-18 * normal(200, 8, 1)),
        (torch.cat([normal(200, 8), 1e7 * normal(1, 8, 5)]), torch.cat([normal(150, 8, 1), 1e6 * normal(1, 8, 6)])),
    ],
    ids=["ties", "same", "copies", "collapsed", "constant", "few", "large", "small", "outliers"],
)
def test_equals_the_definition_with_ties_and_copies(block, real, generated):
    assert precision_recall_density_coverage(real, generated, 5) == pytest.approx(by_definition(real, generated, 5))


def test_agrees_with_the_prdc_package():
    """Recorded from prdc 0.2 with scikit-learn 1.9.1."""
    real, generated = normal(3_000, 64, 1), 0.95 * normal(2_500, 64, 2) + 0.03
    counts = {"precision": 2144 / 2500, "recall": 1454 / 3000, "density": 27319 / 12500, "coverage": 2988 / 3000}
    assert precision_recall_density_coverage(real, generated, 5) == pytest.approx(counts, rel=1e-9)


def test_no_matrix_of_all_pairs_is_held(monkeypatch):
    monkeypatch.setattr(prdc, "BLOCK", 64)
    calls = calls_of(prdc, "_distances")
    precision_recall_density_coverage(normal(400, 4), normal(400, 4, 1))
    monkeypatch.undo()
    assert calls and max(max(block.shape) for _, block in calls) <= 64


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (normal(5, 3), normal(9, 3), 5, "nearest_k=5 .* 1 to 4, below the number of rows"),
        (normal(9, 3), normal(1, 3), 1, "nearest_k=1 .* 1 to 0"),
        (normal(9, 3), normal(9, 3), 0, "nearest_k=0 .* 1 to 8"),
        (normal(9, 3), normal(9, 4), 3, "generated features have dimension 4"),
    ],
)
def test_errors_name_the_numbers(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall_density_coverage(real, generated, k)
