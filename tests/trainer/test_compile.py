# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""`torch_compile=True`: the same training through one compiled network, and nothing of it in what is saved."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters

from tests.helpers import tiny_config, tiny_merge_trainer, tiny_trainer
from tests.trainer.test_distributed import run, values
from trl_distreward import DistributionRewardTrainer, load_pipeline
from trl_distreward.trainer.cuda_graphs import copy_outputs, uses_cuda_graphs

# One size of batch and no evaluation: each would be compiled anew
ONE_SIZE = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "eval_strategy": "no", "max_steps": 1}


def trained(folder, **kwargs):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    trainer = tiny_trainer(folder, **ONE_SIZE, **kwargs)
    seen, velocity = [], trainer.policy.velocity

    def spy(model, *args):
        seen.append((type(model), torch.is_grad_enabled()))
        return velocity(model, *args)

    trainer.policy.velocity = spy
    trainer.train()
    return trainer, seen


def assert_same_training(trainer, expected, atol):
    weights = dict(expected.network.named_parameters())
    for name, value in trainer.network.named_parameters():
        torch.testing.assert_close(value, weights[name], atol=atol, rtol=0)
    log = trainer.state.log_history[0]
    assert trainer.args.loss_type == "rft" or log["ratio/min"] == log["ratio/max"] == 1.0


def test_rollouts_and_updates_go_through_one_compiled_network(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    expected, _ = trained(tmp_path / "plain", **settings)
    trainer, seen = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **settings)
    assert set(seen) == {(OptimizedModule, False), (OptimizedModule, True)}
    assert counters["stats"]["unique_graphs"] == 2  # without and with gradients, each in one piece
    assert_same_training(trainer, expected, atol=0)
    files = [
        {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "plain" / "checkpoint-1", tmp_path / "compiled" / "checkpoint-1")
    ]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 2
    for path, weights in files[0].items():
        assert weights.keys() == files[1][path].keys()
        assert all(torch.equal(value, files[1][path][name]) for name, value in weights.items())
    load_pipeline(tmp_path / "compiled" / "checkpoint-1")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"peft_config": True, "beta": 0.1}, {"loss_type": "rft"}])
@pytest.mark.parametrize(("backend", "atol"), [("aot_eager", 0), ("inductor", 1e-4)])
def test_backends_train_alike(tmp_path, settings, backend, atol):
    def options():
        return {**settings, "peft_config": LoraConfig(r=2)} if "peft_config" in settings else settings

    expected, _ = trained(tmp_path / "plain", **options())
    trainer, _ = trained(tmp_path / backend, torch_compile=True, torch_compile_backend=backend, **options())
    assert_same_training(trainer, expected, atol)


@pytest.mark.slow
@pytest.mark.distributed
def test_gradients_of_a_compiled_network_are_still_shared(tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 6}
    expected, log = run(tmp_path / "plain", 2, settings)
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    weights, other = run(tmp_path / "compiled", 2, settings)
    assert values(other, "grad_norm") == pytest.approx(values(log, "grad_norm"), rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


class Replayed(torch.nn.Module):
    """A network that returns its outputs in the same memory every time, as a recorded graph does."""

    def __init__(self):
        super().__init__()
        self.weight, self.memory = torch.nn.Parameter(torch.tensor(2.0)), torch.zeros(3)

    def forward(self, x):
        out = self.weight * x
        return {"sample": out if torch.is_grad_enabled() else self.memory.copy_(out)}


def test_outputs_outlive_the_next_call_of_a_recorded_graph():
    model = Replayed()
    copy_outputs(model)
    with torch.no_grad():
        first, _ = model(torch.ones(3))["sample"], model(torch.zeros(3))
    assert torch.equal(first, torch.full((3,), 2.0))
    assert model(torch.ones(3))["sample"].grad_fn.name() == "MulBackward0"  # not copied: a backward pass is pending


@pytest.mark.parametrize(("mode", "recorded"), [("reduce-overhead", True), (None, False)])
def test_the_mode_reaches_the_compiler_and_graphs_their_precautions(tmp_path, monkeypatch, mode, recorded):
    settings = {"loss_type": "rft"} if recorded else {}
    expected, _ = trained(tmp_path / "plain", **settings)
    asked, compiler = [], torch.compile

    def compile_eagerly(model, **kwargs):
        asked.append((kwargs["backend"], kwargs.get("mode", "default")))
        return compiler(model, backend="eager")

    held, hold = [], DistributionRewardTrainer.hold_gradients

    def spy(trainer):
        hold(trainer)
        held.append([p.grad is not None and not p.grad.any() for p in trainer.network.parameters() if p.requires_grad])

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(DistributionRewardTrainer, "hold_gradients", spy)
    trainer, _ = trained(tmp_path / "recorded", torch_compile=True, torch_compile_mode=mode, **settings)
    assert asked == [("inductor", mode or "default")]
    assert len(trainer.model_wrapped._forward_hooks) == recorded
    assert len(held) == 1 and all(held[0]) == any(held[0]) == recorded
    assert_same_training(trainer, expected, atol=0)


def test_which_compilers_record_graphs(tmp_path):
    asked = [
        ({}, False),
        ({"torch_compile": True}, False),
        ({"torch_compile_mode": "max-autotune"}, True),
        ({"torch_compile_mode": "max-autotune-no-cudagraphs"}, False),
        ({"torch_compile_backend": "cudagraphs"}, True),
        ({"torch_compile_backend": "eager", "torch_compile_mode": "reduce-overhead"}, False),
    ]
    assert [uses_cuda_graphs(tiny_config(tmp_path, **settings)) for settings, _ in asked] == [r for _, r in asked]


def test_looking_at_the_network_leaves_the_wrappers_as_they_are(tmp_path):
    trainer = tiny_trainer(tmp_path, **ONE_SIZE)
    inner = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(inner)
    inner.module = trainer.network
    trainer.model_wrapped = torch.compile(inner, backend="eager")
    assert trainer.sampled_network is trainer.network
    assert trainer.model_wrapped._orig_mod is inner


def test_a_search_of_coefficients_refuses_it(tmp_path):
    with pytest.raises(ValueError, match="torch_compile does nothing"):
        tiny_merge_trainer(tmp_path, torch_compile=True)
