# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/gpu.py` in its tiny mode: the script works and writes every key."""

import importlib
import json
from pathlib import Path

import pytest

from trl_distreward.trainer.estimators import ESTIMATORS

FORWARD = {"samples_per_second", "flops_per_sample", "utilisation", "seconds_to_compile", "peak_bytes"}
UPDATE = {"seconds", "utilisation", "counted_bytes", "peak_bytes"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return importlib.import_module("gpu")


def test_tiny_mode_writes_every_key(gpu, tmp_path):
    gpu.main(["--tiny", "--output", str(tmp_path / "gpu.json")])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] and written["tiny"] and min(written["matmul_flops_per_second"], written["seconds"]) > 0
    parts = {row["part"]: row["values"] for row in written["rows"]}
    assert set(parts["replaced Fréchet distance"]) == {"rows", "width", "fit", "replaced", "peak_bytes"}
    for name in ("SiT-XL/2", "EDM2-XS", "UNet of 35M"):
        assert set(parts[f"forward, {name}"]) == FORWARD
    for name in ESTIMATORS:
        values = parts[f"update, {name}"]
        assert set(values) == UPDATE and set(values["seconds"]) == {"rollout", "reward", "update", "refresh"}
        assert all(value > 0 for value in values["utilisation"].values())
    assert len(parts) == 1 + 3 + len(ESTIMATORS)


def test_no_part_begins_after_the_budget(gpu, tmp_path):
    gpu.main(["--tiny", "--budget", "0", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) > 5 and all(row["values"] is None for row in rows)
