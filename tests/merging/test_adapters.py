# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of LoRA adapters: a merge adds the weighted sum of what the adapters add."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from trl_distreward import CheckpointPool


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 6)
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(6, 2)

    def forward(self, x, labels):
        return self.head(self.linear(self.conv(x).mean((2, 3)) + self.embedding(labels)))


def write(folder, count=3, **kwargs):
    targets = {"target_modules": ["conv", "linear", "embedding"], "r": 2, "lora_alpha": 3}
    paths = []
    for seed in range(count):
        model = get_peft_model(Base(), LoraConfig(**{**targets, **kwargs}))
        torch.manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / str(seed))
        paths.append(folder / str(seed))
    return paths


def deltas(network):
    """Returns what an adapter adds to each weight."""
    merged, base = network.merge_and_unload(), Base()
    return {key: merged.state_dict()[key].double() - value.double() for key, value in base.state_dict().items()}


def loaded(path):
    return deltas(PeftModel.from_pretrained(Base(), path))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_rslora": True}, {"rank_pattern": {"linear": 4}, "alpha_pattern": {"linear": 5}}],
    ids=["plain", "rslora", "patterns"],
)
def test_merge_is_the_combination_of_what_the_adapters_add(tmp_path, kwargs):
    paths = write(tmp_path, **kwargs)
    pool, weights = CheckpointPool(paths), torch.tensor([-0.4, 0.9, 0.7], dtype=torch.float64)
    network = get_peft_model(Base(), pool.adapter_config)
    pool.merge_into(network, weights)
    alone, merged = [loaded(path) for path in paths], deltas(network)
    for key in merged:
        expected = sum(w * d[key] for w, d in zip(weights, alone, strict=True))
        torch.testing.assert_close(merged[key], expected, rtol=0, atol=1e-5)
    assert merged["linear.weight"].abs().max() > 0.1


def test_merge_is_saved_as_an_adapter_that_loads(tmp_path):
    paths = write(tmp_path)
    pool, weights = CheckpointPool(paths), torch.tensor([0.2, 0.3, 0.5])
    pool.save_merged(tmp_path / "merged" / "adapter_model.safetensors", weights)
    network = get_peft_model(Base(), pool.adapter_config)
    pool.merge_into(network, weights)
    saved, merged = loaded(tmp_path / "merged"), deltas(network)
    assert all(torch.equal(saved[key], merged[key]) for key in merged)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "merged/adapter_model.safetensors").items()}
    assert shapes == pool.shapes
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["r"] == 6


@pytest.mark.parametrize(
    "name",
    ["transformer.0.to_q.lora_A.weight", "lora_unet_to_q.lora_up.weight", "unet.processor.to_q_lora.down.weight"],
)
def test_factors_without_a_configuration_are_refused(tmp_path, name):
    save_file({name: torch.ones(2, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no adapter_config.json, which LoRA factors such as .* need"):
        CheckpointPool([tmp_path / "a.safetensors"] * 2)


def test_whole_modules_beside_an_adapter_are_weighted(tmp_path):
    paths = write(tmp_path, modules_to_save=["head"])
    pool = CheckpointPool(paths)
    network = get_peft_model(Base(), pool.adapter_config)
    pool.merge_into(network, torch.tensor([0.0, 1.0, 0.0]))
    merged = network.merge_and_unload().head.weight
    assert torch.equal(merged, PeftModel.from_pretrained(Base(), paths[1]).merge_and_unload().head.weight)


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 3, groups=2), nn.Conv2d(4, 8, 1, groups=4)])
def test_adapters_of_grouped_convolutions_are_refused(tmp_path, module):
    adapted = get_peft_model(nn.Sequential(module), LoraConfig(r=4, target_modules=["0"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="grouped convolution, .*lora_A.*exclude_modules"):
        CheckpointPool([tmp_path] * 2)


def test_a_merged_adapter_names_no_path_of_its_base(tmp_path):
    paths = write(tmp_path, count=2)
    config = paths[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    CheckpointPool(paths).save_merged(tmp_path / "merged" / "adapter_model.safetensors", torch.ones(2) / 2)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_adapters_that_differ_are_refused(tmp_path):
    paths = write(tmp_path, count=2)
    config = paths[1] / "adapter_config.json"
    original = json.loads(config.read_text())
    for name, value in (
        ("lora_alpha", 4),
        *(("use_dora", True), ("use_bdlora", {"nblocks": 2}), ("target_parameters", ["head.weight"])),
        ("peft_type", "IA3"),
        *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_4", "olora")),  # change the network below
    ):
        config.write_text(json.dumps({**original, name: value}))
        with pytest.raises(ValueError, match=f"{name}|{value}"):
            CheckpointPool(paths)
    config.write_text(json.dumps(original | {"target_modules": original["target_modules"][::-1], "lora_dropout": 0.5}))
    CheckpointPool(paths)
    config.unlink()
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        CheckpointPool(paths)


def test_networks_that_do_not_fit_are_refused_and_stay(tmp_path):
    paths = write(tmp_path, count=2)
    pool = CheckpointPool(paths)
    shallow = CheckpointPool(paths[:1]).adapter_config
    for network in (
        Base(),
        get_peft_model(Base(), LoraConfig(target_modules=["linear"], r=4, lora_alpha=6)),
        get_peft_model(Base(), shallow),
    ):
        before = {name: p.clone() for name, p in network.named_parameters()}
        with pytest.raises(ValueError, match="and peft.get_peft_model"):
            pool.merge_into(network, torch.ones(2))
        assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
