# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Runs that report to the trackers themselves, without the network: what each has after two trainings."""

import json
import sqlite3

import pytest

from tests.helpers import tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP

pytestmark = pytest.mark.slow


def of_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = [reader.EventAccumulator(str(path.parent)).Reload().Tags() for path in folder.rglob("*.tfevents.*")]
    return {name for tags in files for kind in ("scalars", "images") for name in tags[kind]}


def of_wandb(folder):
    import wandb

    names = set(wandb.run.summary.keys())
    assert wandb.run.config["reference_set_size"] == 24 and wandb.run.name == "a run"
    wandb.finish()
    return names


def of_trackio(folder):
    with sqlite3.connect(folder / "trackio" / "p.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    grids = [row["train/global_step"] for row in rows if "samples" in row]
    assert sorted(grids) == [0, 0, 1, 1, 2, 2]
    return {name for row in rows for name in row}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_has_values_and_grids_of_training_and_evaluation(tmp_path, monkeypatch, name):
    folders = {"WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio"}  # the latter is read on import
    for variable, value in {"WANDB_MODE": "offline", **folders}.items():
        monkeypatch.setenv(variable, str(value))
    pytest.importorskip(name)
    settings = {"report_to": name, "run_name": "a run", "project": "p", "log_samples": True, **EVALUATE_EVERY_STEP}
    trainer = tiny_trainer(tmp_path, max_steps=2, **settings)
    trainer.train()
    trainer.train()
    assert globals()[f"of_{name}"](tmp_path) >= {"train/reward_std", "eval/ode_distance_features", "samples"}
