# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Documented tables match the stored results."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"


@pytest.fixture
def module(monkeypatch):
    for folder in (FOLDER, FOLDER.parent):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def test_affordable_updates_count_reference_sets(module):
    affordable = module("experiments").affordable_updates
    # 1,000 + 10 updates + 1,000 + 9 updates of 256 are 6,864
    assert affordable({"reference_update": "refresh"}, 7000, 256) == 19
    assert affordable({"reference_update": "rolling"}, 7000, 256) == 23
    assert affordable({"reference_update": "rolling"}, 0, 256) == 1


def test_documented_tables_match_results(module):
    page = module("page")
    assert page.pages()
    for path in page.pages():
        text = path.read_text()
        assert page.filled(text, FOLDER) == text, f"{path.name}: run python benchmarks/paper page"


def test_every_result_belongs_to_an_arm_of_an_experiment(module):
    experiments = module("experiments").EXPERIMENTS
    for path in FOLDER.glob("*.json"):
        name, data = path.stem.rsplit("_", 1)
        arms = set(module("page").Results(FOLDER, name, data).arms)
        assert arms <= ({"spread"} if name == "reward_spread" else {"base", *experiments[name].arms}), path.name


def test_results_are_compact():
    paths = list(FOLDER.parent.rglob("*.json"))
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 3500
    for path in paths:
        content = json.loads(path.read_text())
        assert content["rows"] and content["versions"]["torch"] and content["command"].startswith("python benchmarks/")


def test_the_interval_of_a_mean_is_that_of_its_resamples(module):
    interval = module("results").interval
    # 1 of all 3,125 resamples has mean 1; 2.5% have at most 1.8
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.8, 4.2)
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_images_to_target_are_interpolated(module):
    def run(last, images, *curve):
        return [{"seed": 0, "images": images, "d": last, "curve": [{"images": i, "d": d} for i, d in curve]}]

    runs = {
        "base": run(10.0, 0),
        "reaches": run(1.0, 4000, (2000, 8.0), (3000, 6.0)),
        "at once": run(1.0, 3000, (2000, 4.0)),  # the first 1,000 train nothing
        "misses": run(9.0, 4000, (2000, 8.0), (3000, 7.5)),
    }
    for arm, expected in (("reaches", pytest.approx(2500)), ("at once", pytest.approx(1500)), ("misses", None)):
        assert module("summary").images_to_target(runs, arm, "d") == [expected]


def test_changes_compare_runs_of_the_same_seed(module):
    runs = {"base": [{"seed": 0, "d ode": 10.0}, {"seed": 1, "d ode": 20.0}]}
    runs["arm"] = [{"seed": 0, "d ode": 5.0}, {"seed": 1, "d ode": 10.0}]
    row = module("results").summarize(runs)[-1]
    assert row == {"arm": "arm", "metric": "d ode", "mean": 7.5, "interval": [5.1875, 9.8125], "change": [-50.0] * 3}
