# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""`torch_compile=True` trains the same through one compiled network, and leaves no trace in what is saved."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters

from tests.helpers import QUIET, tiny_config, tiny_pipeline, tiny_reward, tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights, calls_of, weights
from tests.trainer.test_distributed import run, values
from trl_distreward import MergeCoefficientConfig, MergeCoefficientTrainer, load_pipeline

# A single batch size, because each is compiled anew
ONE_SIZE = {
    "per_device_train_batch_size": 6,
    "rollout_batch_size": 6,
    "per_device_eval_batch_size": 6,
    "eval_strategy": "no",
    "max_steps": 1,
}


def trained(folder, **kwargs):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    trainer = tiny_trainer(folder, **ONE_SIZE, **kwargs)
    calls = calls_of(trainer.policy, "velocity")
    trainer.train()
    return trainer, {(type(model), velocity.requires_grad) for (model, *_), velocity in calls}


def assert_same_training(trainer, expected, atol):
    for name, value in weights(expected.network).items():
        torch.testing.assert_close(weights(trainer.network)[name], value, atol=atol, rtol=0)
    log = trainer.state.log_history[0]
    assert trainer.args.loss_type == "rft" or log["ratio/min"] == log["ratio/max"] == 1.0


def test_rollouts_and_updates_go_through_one_compiled_network(tmp_path):
    settings = {**SAVE_EVERY_STEP, "ema_decay": 0.5}
    expected, _ = trained(tmp_path / "plain", **settings)
    trainer, seen = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **settings)
    assert seen == {(OptimizedModule, False), (OptimizedModule, True)}
    assert counters["stats"]["unique_graphs"] == 2  # without and with gradients, each in one piece
    assert_same_training(trainer, expected, atol=0)
    folders = [tmp_path / name / "checkpoint-1" for name in ("plain", "compiled")]
    files = [{path.relative_to(folder) for path in folder.rglob("*.safetensors")} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 2
    for path in files[0]:
        plain, compiled = (load_file(folder / path) for folder in folders)
        assert plain.keys() == compiled.keys()
        assert all(torch.equal(value, compiled[name]) for name, value in plain.items())
    load_pipeline(folders[1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"peft_config": LoraConfig(r=2), "beta": 0.1}, {"loss_type": "rft"}])
@pytest.mark.parametrize(("backend", "atol"), [("aot_eager", 0), ("inductor", 1e-4)])
def test_backends_train_alike(tmp_path, settings, backend, atol):
    expected, _ = trained(tmp_path / "plain", **settings)
    trainer, _ = trained(tmp_path / backend, torch_compile=True, torch_compile_backend=backend, **settings)
    assert_same_training(trainer, expected, atol)


@pytest.mark.slow
@pytest.mark.distributed
def test_gradients_of_a_compiled_network_are_still_shared(tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 6}
    expected, log = run(tmp_path / "plain", 2, settings)
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    found, other = run(tmp_path / "compiled", 2, settings)
    assert values(other, "grad_norm") == pytest.approx(values(log, "grad_norm"), rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_mode": "max-autotune"},
        {"torch_compile_mode": "reduce-overhead"},  # a mode alone turns compiling on as well
        {"torch_compile_backend": "cudagraphs"},
    ],
)
def test_compilers_that_record_cuda_graphs_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="CUDA graphs"):
        tiny_config(tmp_path, **settings)
    assert tiny_config(tmp_path, torch_compile_mode="max-autotune-no-cudagraphs").torch_compile


def in_place(pipeline, whole):
    pipeline.transformer.compile(backend="eager")


def wrapped(pipeline, whole):
    owner, name = (pipeline, "transformer") if whole else (pipeline.transformer.blocks, "1")
    setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))


@pytest.mark.parametrize(
    ("compiled", "whole", "lora"),
    [(wrapped, True, None), (wrapped, False, LoraConfig(r=2, target_modules=["qkv"])), (in_place, True, None)],
)
def test_a_pipeline_that_is_compiled_already_is_trained_as_if_it_were_not(tmp_path, compiled, whole, lora):
    best = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True, **EVALUATE_EVERY_STEP}
    settings = {"peft_config": lora, "max_steps": 2, "beta": 0.1, "overwrite_output_dir": True}
    settings, networks, saved = settings | SAVE_EVERY_STEP | best, [], []
    for folder in (tmp_path / "plain", tmp_path / "compiled"):
        for resume in (None, str(folder / "checkpoint-1")):
            pipeline = tiny_pipeline()
            if folder.name == "compiled":
                compiled(pipeline, whole)
            trainer = tiny_trainer(folder, pipeline, eval_metrics={"rising": Rising()}, **settings)
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        networks.append(trainer.network)
        saved.append({str(p.relative_to(folder)): load_file(p).keys() for p in folder.rglob("*.safetensors")})
    assert_same_weights(*networks)
    assert saved[0] == saved[1]
    pipeline, merge = tiny_pipeline(), MergeCoefficientConfig(str(tmp_path / "merged"), max_steps=1, **QUIET)
    compiled(pipeline, whole)
    checkpoints = [tmp_path / "compiled" / f"checkpoint-{step}" for step in (1, 2)]
    MergeCoefficientTrainer(pipeline, checkpoints, tiny_reward(), merge).save_model()
    load_pipeline(tmp_path / "merged")
