# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The documented tables are those of the results that are kept."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("page")


def test_updates_that_a_budget_pays_for_count_every_reference_set(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    affordable = importlib.import_module("experiments").affordable_updates
    # 1,000 + 10 updates + 1,000 + 9 updates of 256 are 6,864
    assert affordable({"reference_update": "refresh"}, 7000, 256) == 19
    assert affordable({"reference_update": "rolling"}, 7000, 256) == 23
    assert affordable({"reference_update": "rolling"}, 0, 256) == 1


def test_documented_tables_are_those_of_the_results(page):
    pages = page.pages()
    assert pages
    for path in pages:
        text = path.read_text()
        assert page.filled(text, FOLDER) == text, f"{path.name}: run python benchmarks/paper page"


def test_results_of_several_seeds_are_shown(page):
    shown = {page.TABLES[name][0] + "_" + data for path in page.pages() for name, data in page.asked(path.read_text())}
    kept = {path.stem: page.load(FOLDER, *path.stem.rsplit("_", 1)) for path in FOLDER.glob("*.json")}
    for runs in kept.values():  # of the seeds that all arms have
        assert len({tuple(run["seed"] for run in results) for results in runs.values()}) == 1
    several = {name for name, runs in kept.items() if len(next(iter(runs.values()))) > 1}
    assert several <= shown <= set(kept)


def test_interval_is_that_of_the_mean(page):
    low, high = page.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # of all 3,125 resamples 1 in 3,125 has mean 1; 2.5% lie at or below 1.8
    assert (low, high) == (1.8, 4.2)
    assert page.interval([2.0, 2.0]) == (2.0, 2.0)


def test_images_to_target_are_interpolated_and_a_miss_is_none(page):
    def run(**values):
        return {"seed": 0, **values}

    runs = {
        "base": [run(images=0, d=10.0)],
        "reaches": [run(images=4000, d=1.0, curve=[{"images": 2000, "d": 8.0}, {"images": 3000, "d": 6.0}])],
        "at once": [run(images=3000, d=1.0, curve=[{"images": 2000, "d": 4.0}])],  # the first 1,000 train nothing
        "misses": [run(images=4000, d=9.0, curve=[{"images": 2000, "d": 8.0}, {"images": 3000, "d": 7.5}])],
    }
    assert page.images_to_target(runs, "reaches", "d") == pytest.approx([2500])
    assert page.images_to_target(runs, "at once", "d") == pytest.approx([1500])
    assert page.images_to_target(runs, "misses", "d") == [float("inf")]
