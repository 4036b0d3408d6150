# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers import tiny_sit, tiny_trainer
from trl_distreward.scripts import train
from trl_distreward.trainer import costs
from trl_distreward.trainer.costs import PeakMemory, Plan, count_network
from trl_distreward.trainer.dry_run import predict
from trl_distreward.trainer.sharding import without_weights


def sit_flops(tokens, d, layers, channels=1, patch=2):
    """Two per multiplication: forward of one sample, by hand."""
    block = tokens * 12 * d**2 + 2 * tokens**2 * d + 6 * d**2  # qkv, projection and MLP; attention; modulation
    ends = 2 * tokens * channels * patch**2 * d + 2 * d**2  # patches in and out; modulation
    return 2 * (layers * block + ends + 256 * d + d**2)  # and the embedding of the time


def sit_inputs(batch):
    return torch.zeros(batch, 1, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)


@pytest.fixture
def sit():
    return tiny_sit(sample_size=8, hidden_size=32, num_layers=3)


def test_flops_are_those_of_a_transformer_by_hand(sit):
    work = count_network(lambda network: network(*sit_inputs(5)), without_weights(sit), bf16=False)
    assert work.forward == 5 * sit_flops(tokens=16, d=32, layers=3)
    inputs = 5 * 2 * (16 * 4 * 32 + 256 * 32)  # have no gradient: patches and embedded times
    assert work.both == 3 * work.forward - inputs


def test_frozen_weights_and_convolutions_are_counted(sit):
    adapted = get_peft_model(sit, LoraConfig(r=2, target_modules=["qkv"]))
    work = count_network(lambda network: network(*sit_inputs(1)), without_weights(adapted), bf16=False)
    adapter = 3 * 16 * 2 * (32 + 96) * 2
    assert work.forward == sit_flops(16, 32, 3) + adapter
    assert work.both < 2.2 * work.forward  # gradients of the frozen weights are not made
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))  # which has buffers
    assert count_network(lambda network: network(torch.zeros(2, 3, 8, 8)), conv, False).forward == 2 * 2 * 64 * 8 * 27


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_held_bytes_are_those_of_a_real_pass(sit, bf16, checkpointing):
    if checkpointing:
        sit.enable_gradient_checkpointing()
    sit.train()
    work = count_network(lambda network: network(*sit_inputs(4)), without_weights(sit), bf16)
    for parameter in sit.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with PeakMemory() as real, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sit(*sit_inputs(4)).sample.sum().backward()
    assert work.held == pytest.approx(real.peak, rel=0.05)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_prediction_adds_up(tmp_path, monkeypatch, guidance_scale):
    settings = {"guidance_scale": guidance_scale, "eval_strategy": "steps", "eval_steps": 1, "bf16": True}
    trainer = tiny_trainer(tmp_path, **settings)
    plan, each = Plan.of(trainer), sit_flops(tokens=4, d=16, layers=2)
    found = predict(trainer, "h100")
    for phase in ("rollout", "evaluation"):
        assert found.flops[phase] == pytest.approx(plan.counts[phase] * each + 2 * plan.images[phase] * 16 * 8)
    assert 2.5 < found.flops["update"] / (plan.counts["update"] * each) < 3
    assert found.seconds["update"] == pytest.approx(found.flops["update"] / costs.UTILISATION / 989e12)
    assert found.memory == sum(found.parts.values()) and found.parts["optimizer"] == 2 * found.parts["gradients"]
    assert found.fits and "1 x H100, predicted" in str(found)
    monkeypatch.setitem(costs.GPUS, "h100", (1e12, 1e12, 1000))
    assert "lower per_device_train_batch_size" in str(predict(trainer, "h100"))


def test_the_command_predicts_without_running_the_network(tmp_path, capsys, monkeypatch):
    def build(*_):
        trainer = tiny_trainer(tmp_path)
        trainer.network.register_forward_hook(lambda *_: pytest.fail("the network was run"))
        return trainer

    monkeypatch.setattr(train, "build_trainer", build)
    options = ["--model", "-", "--feature_extractor", "-", "--real_images", "-", "--output_dir", str(tmp_path)]
    train.main([*options, "--device", "h200", "--use_cpu", "True"])
    assert "2 updates on 1 x H200, predicted" in capsys.readouterr().out
