# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(output, processes, settings):
    output.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    command = [*launcher, str(SCRIPT), str(output), json.dumps(settings)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(output / "weights"), json.loads((output / "log.json").read_text())


def values(log, key):
    return [entry[key] for entry in log["history"] if key in entry]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3, "reference_refresh_steps": 2, "num_eval_images": 17},
        {"max_steps": 3, "reference_update": "rolling", "replace_size": 1, "top_advantage_quantile": 0.2},
    ],
)
def test_many_processes_train_as_one(tmp_path, settings):
    expected, log = run(tmp_path / "one", 1, settings)
    for processes in (2, 3):
        weights, other = run(tmp_path / str(processes), processes, settings)
        for key in ("reward", "reward_std", "advantage_kept", "reference_distance/features"):
            assert values(other, key) == pytest.approx(values(log, key), rel=1e-5), key
        assert values(other, "ratio/min") == values(other, "ratio/max") == [1.0] * 3
        for name, value in expected.items():  # gradients add up in another order
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)
        for name in ("eval_sde_distance_features", "eval_ode_distance_features"):
            assert other["metrics"][name] == pytest.approx(log["metrics"][name], rel=1e-2)


@pytest.mark.distributed
def test_two_processes_resume_exactly_in_the_middle_of_a_generation(tmp_path):
    settings = {
        "max_steps": 4,
        "num_iterations": 2,
        "epsilon": 0.2,
        "reference_update": "rolling",
        "ema_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    expected, log = run(tmp_path / "whole", 2, settings)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert {path.name for path in checkpoint.glob("process_state_*")} == {"process_state_0.pt", "process_state_1.pt"}
    weights, other = run(tmp_path / "resumed", 2, {**settings, "resume_from": str(checkpoint)})
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert values(other, "reward") == values(log, "reward")
