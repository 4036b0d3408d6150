# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import doctest
import os
import re
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from trl_distreward import FeatureStatistics, feature_metrics, frechet_distance, precision_recall_density_coverage
from trl_distreward.metrics import kernel_inception_distance

HUB = Path(__file__).parents[1] / "metrics_hub"
NAMES = ["frechet_distance", "kernel_distance", "prdc"]
OPTIONS = {"kernel_distance": {"subset_size": 20, "num_subsets": 3, "seed": 4}, "prdc": {"precision_recall_k": 3}}


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Temporary caches for the modules' code and rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp("cache"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            del sys.modules[name]


def rows(count, seed, dimension=6):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32) + seed / 10


def expected(name, real, generated):
    real, generated = torch.from_numpy(real), torch.from_numpy(generated)
    if name == "frechet_distance":
        return {name: frechet_distance(*map(FeatureStatistics.from_features, (generated, real)))}
    if name == "kernel_distance":
        mean, std = kernel_inception_distance(real, generated, **OPTIONS[name])
        return {name: mean, f"{name}_std": std}
    return precision_recall_density_coverage(real, generated, **OPTIONS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counts", [(60, 60), (60, 35)])
def test_module_gives_the_librarys_number(name, counts):
    real, generated = rows(counts[0], 1), rows(counts[1], 2)
    module = evaluate.load(str(HUB / name))
    assert module.name == name
    result = module.compute(predictions=generated, references=real, **OPTIONS.get(name, {}))
    assert result == pytest.approx(expected(name, real, generated), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_either_set_add_up(name):
    real, generated = rows(50, 1), rows(41, 2)
    module = evaluate.load(str(HUB / name))
    for batch in np.array_split(generated[:40], 3):
        module.add_batch(predictions=torch.from_numpy(batch))
    module.add(prediction=generated[40].tolist())
    module.add_batch(references=real.tolist())
    result = module.compute(**OPTIONS.get(name, {}))
    assert result == pytest.approx(expected(name, real, generated), rel=1e-12)


def test_frechet_distance_takes_statistics_of_the_real_images(tmp_path):
    statistics, generated = FeatureStatistics.from_features(torch.from_numpy(rows(50, 1))), rows(40, 2)
    statistics.save(tmp_path / "real.safetensors")
    module = evaluate.load(str(HUB / "frechet_distance"))
    result = module.compute(predictions=generated, statistics=str(tmp_path / "real.safetensors"))
    assert result == {"frechet_distance": feature_metrics(statistics, torch.from_numpy(generated))["frechet"]}


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_help_give_what_they_show(name, monkeypatch):
    monkeypatch.chdir(HUB.parent)
    results = doctest.testmod(sys.modules[type(evaluate.load(str(HUB / name))).__module__])
    assert results.attempted > 3 and not results.failed


@pytest.mark.parametrize("name", NAMES)
def test_card_shows_an_example_that_runs(name, monkeypatch):
    card = (HUB / name / "README.md").read_text()
    example = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[-1]
    monkeypatch.chdir(HUB.parent)
    names: dict = {}
    exec(example, names)
    assert isinstance(names[name], evaluate.Metric)
    assert {"README.md", "app.py", "requirements.txt", f"{name}.py"} <= set(os.listdir(HUB / name))
