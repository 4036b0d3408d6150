# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import tiny_merge_trainer, tiny_pool, tiny_trainer
from tests.runs import SAVE_EVERY_STEP, launch
from tests.trainer.distributed_run import train
from tests.trainer.sharded_launch import DEEPSPEED, FSDP2
from trl_distreward.generation import SamplingSchedule
from trl_distreward.trainer.checks import check_launch

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(output, processes, settings):
    """Trains, in this process or in several others; returns the weights and the log."""
    output.mkdir()
    if processes == 1:
        train(output, dict(settings))
    else:
        result = launch(SCRIPT, output, json.dumps(settings), processes=processes, ACCELERATE_USE_CPU="true")
        assert result.returncode == 0, result.stderr[-3000:]
    return load_file(output / "weights"), json.loads((output / "log.json").read_text())


def drawn(folder):
    """The grid of samples before training."""
    return np.asarray(Image.open(folder / "samples" / "step-0.png")).astype(int)


def values(log, key):
    return [entry[key] for entry in log["history"] if key in entry]


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_in_the_same_micro_batch(tmp_path):
    settings = {"max_steps": 3, "reference_update": "rolling", "per_device_train_batch_size": 3}
    expected, log = run(tmp_path / "whole", 2, settings)
    run(tmp_path / "stopped", 2, {**settings, "stop": 1})
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-1"]
    resume = {**settings, "resume_from": str(tmp_path / "stopped" / "checkpoint-1")}
    weights, other = run(tmp_path / "resumed", 2, resume)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert values(other, "reward") == values(log, "reward")


@pytest.mark.distributed
@pytest.mark.parametrize("fail", [(1, "score"), (0, "write_model")])
def test_a_process_that_fails_ends_the_others_and_its_error_comes_first(tmp_path, fail):
    settings = json.dumps({"max_steps": 3, **SAVE_EVERY_STEP, "fail": fail})
    result = launch(SCRIPT, tmp_path, settings, ACCELERATE_USE_CPU="true")  # within its time limit
    errors = [line for line in result.stderr.splitlines() if re.match(r"(\[rank\d\]: )?\w+Error: ", line)]
    assert result.returncode != 0 and errors[0].endswith("this process fails")


BACKPROP = {"loss_type": "backprop", "reference_update": "rolling", "backprop_from": 0.5, "checkpoint_steps": True}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (3, {"reference_refresh_steps": 2, "num_eval_images": 17}),
        (2, {"reference_update": "rolling", "replace_size": 1, "top_advantage_quantile": 0.2, "bright": True}),
        (2, BACKPROP),
        (2, {"loss_type": "transport", "sampler": "ode", "transport_advantage": 0.5}),
        pytest.param(3, {"loss_type": "nft", "top_advantage_quantile": 0.4}, marks=pytest.mark.slow),
        pytest.param(3, BACKPROP, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_like_one(tmp_path, processes, settings):
    settings = {**settings, "max_steps": 3, "samples": 5}
    expected, log = run(tmp_path / "one", 1, settings)
    weights, other = run(tmp_path / "several", processes, settings)
    # batches have other sizes, so pixels may round to the next of 256 values
    assert np.abs(drawn(tmp_path / "several") - drawn(tmp_path / "one")).max() <= 1
    assert len(values(log, "reward")) == 3
    for key in ("reward", "reward_std", "advantage_kept", "reference_distance/features"):
        assert values(other, key) == pytest.approx(values(log, key), rel=1e-9), key
    assert bool(values(log, "darkness")) == ("bright" in settings)
    assert values(other, "darkness") == pytest.approx(values(log, "darkness"))
    if settings.get("loss_type", "grpo") == "grpo":
        assert values(other, "ratio/min") == values(other, "ratio/max") == [1.0] * 3
    for name, value in expected.items():  # gradients add up in another order
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)
    for name in ("eval_sde_distance_features", "eval_ode_distance_features"):
        assert other["metrics"][name] == pytest.approx(log["metrics"][name], rel=1e-2)


@pytest.mark.distributed
def test_two_processes_resume_exactly_between_the_updates_of_a_rollout(tmp_path):
    updates = {"max_steps": 4, "num_iterations": 2, "epsilon": 0.2, "ema_decay": 0.5}
    settings = {**updates, "reference_update": "rolling", **SAVE_EVERY_STEP}
    expected, log = run(tmp_path / "whole", 2, settings)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert {path.name for path in checkpoint.glob("process_state_*")} == {"process_state_0.pt", "process_state_1.pt"}
    weights, other = run(tmp_path / "resumed", 2, {**settings, "resume_from": str(checkpoint)})
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert values(other, "reward") == values(log, "reward")


@pytest.mark.distributed
def test_several_processes_find_the_same_merge_as_one(tmp_path):
    checkpoints, settings = tiny_pool(tmp_path), {"method": "emanet", "num_eval_images": 17}
    alone = tiny_merge_trainer(tmp_path / "one", checkpoints, **settings)
    alone.train()
    metrics, log = alone.evaluate(), {"history": alone.state.log_history}
    settings |= {"merge": True, "checkpoints": checkpoints}
    weights, other = run(tmp_path / "two", 2, settings)  # of five candidates, one process has three
    assert len(values(log, "reward")) == 3
    for key in ("reward", "reward_best", "num_images", *(f"coefficients/{i}" for i in range(4))):
        assert values(other, key) == values(log, key), key
    assert all(torch.equal(weights[name], p) for name, p in alone.merged_network.named_parameters())
    name = "eval_ode_distance_features"
    assert other["metrics"][name] == pytest.approx(metrics[name], rel=1e-2)


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launch", "settings"),
    [
        ("fsdp2", {"ema_decay": 0.5}),
        pytest.param("fsdp2", BACKPROP, marks=pytest.mark.slow),
        pytest.param("fsdp2", {"lora": True}, marks=pytest.mark.slow),
        pytest.param("zero2", {}, marks=needs_deepspeed),
        pytest.param("zero3", {}, marks=needs_deepspeed),
        pytest.param("zero3", {"lora": True}, marks=needs_deepspeed),
        pytest.param("zero2", BACKPROP, marks=needs_deepspeed),
        pytest.param("zero3", BACKPROP, marks=needs_deepspeed),
    ],
)
def test_split_weights_train_save_and_resume_like_whole_ones(tmp_path, launch, settings):
    settings = {**settings, "max_steps": 3, **SAVE_EVERY_STEP}
    expected, log = run(tmp_path / "whole", 1, settings)
    weights, other = run(tmp_path / "split", 2, {**settings, "launch": launch})
    assert values(other, "reward") == pytest.approx(values(log, "reward"), rel=1e-9)
    assert values(other, "grad_norm") == pytest.approx(values(log, "grad_norm"), rel=1e-5)
    network, adapter = "transformer/diffusion_pytorch_model.safetensors", "adapter/adapter_model.safetensors"
    checkpoint = f"checkpoint-3/{adapter if 'lora' in settings else network}"
    for file in (f"saved/{network}", checkpoint):  # whole, in float32, and the averages if there are any
        pairs = [load_file(tmp_path / run_dir / file) for run_dir in ("whole", "split")]
        assert pairs[0].keys() == pairs[1].keys()
        for name, value in pairs[0].items():
            torch.testing.assert_close(pairs[1][name], value, atol=1e-5, rtol=1e-3)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)
    checkpoint = tmp_path / "split" / "checkpoint-2"
    settings |= {"launch": launch, "resume_from": str(checkpoint), "again": launch == "fsdp2"}
    resumed, again = run(tmp_path / "resumed", 2, settings)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert values(again, "reward") == values(other, "reward")


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("fsdp2", FSDP2), ("deepspeed_zero2", DEEPSPEED[2]), ("deepspeed_zero3", DEEPSPEED[3]), ("multi_gpu", {})],
)
def test_the_examples_launch_as_these_tests_do(preset, expected):
    path = SCRIPT.parents[2] / "examples" / "accelerate_configs" / f"{preset}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, _, _ = _validate_launch_command(args)  # refuses unknown keys
    args.deepspeed_fields_from_accelerate_config = ""  # for error messages only
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    assert {key: environment.get(key) for key in expected} == expected


def test_launches_that_would_fail_late_are_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="set ema_decay=0"):
        check_launch(trainer)
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = False, True
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    trainer.args.eval_schedules["ode"] = SamplingSchedule(4, "ode", solver="dopri5")
    with pytest.raises(ValueError, match="eval_solver='dopri5' steps differently on each process"):
        check_launch(trainer)
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="fsdp_version=1: set it to 2"):
        check_launch(trainer)
