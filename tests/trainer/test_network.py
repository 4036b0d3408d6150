# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The network as it is trained: dropout, precision, adapters, activation checkpointing."""

import copy
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.helpers import tiny_config, tiny_pipeline, tiny_reward, tiny_trainer, trained
from tests.policies_tiny import sd3
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, logged, weights
from trl_distreward import DistributionRewardTrainer, load_pipeline
from trl_distreward.trainer.network import prepare_network

SD3 = {"time_grid": "auto", "last_step_size": 0}


def brightness(images, **kwargs):
    return images.float().mean((1, 2, 3))


def test_an_adapters_own_dropout_is_off_and_its_targets_have_a_default(tmp_path):
    trainer = trained(tmp_path, peft_config=LoraConfig(r=2, lora_dropout=0.5), learning_rate=1e-2, max_steps=3)
    assert max(logged(trainer, "delta_log_prob")) < 1e-5
    adapted = [name.split(".lora_A")[0] for name in weights(trainer.network) if "lora_A" in name]
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"qkv", "proj", "fc1", "fc2"}
    assert not any("x_embedder" in name for name in adapted)


def test_an_adapter_that_changes_the_weights_below_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the weights below the adapter"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, init_lora_weights="pissa"))


def test_lora_trains_the_adapter_alone_and_both_forms_are_saved(tmp_path):
    peft_config = LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules="x_embedder.proj")
    trainer = tiny_trainer(tmp_path / "run", peft_config=peft_config, beta=0.1, learning_rate=1e-2)
    assert isinstance(trainer.model, PeftModel) and trainer.initial_model is None
    before = weights(trainer.network)
    trainer.train()
    moved = {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert logged(trainer, "kl")[1] > 0
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    merged = load_pipeline(tmp_path / "out").transformer.eval()
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 1])
    expected = trainer.network.eval()(x, t, labels).sample
    torch.testing.assert_close(merged(x, t, labels).sample, expected, atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_trained_in_float32(tmp_path, caplog):
    pipeline = tiny_pipeline()
    pipeline.to(torch.bfloat16)
    trainer = trained(tmp_path, model=pipeline, beta=0.1)
    assert "half precision" in caplog.text and logged(trainer, "kl") == [0.0]
    for network in (trainer.network, trainer.initial_model):
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_an_adapter_of_a_half_precision_network_is_merged_in_float32(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    before = {name: value.float() for name, value in weights(pipeline.transformer).items()}
    peft_config = LoraConfig(r=2, target_modules=["qkv"])
    trainer = trained(tmp_path, model=pipeline, peft_config=peft_config, learning_rate=1e-4, max_steps=2)
    trainer.save_model(str(tmp_path / "out"))
    merged = weights(load_pipeline(tmp_path / "out").transformer)
    changes = {name: merged[name].float() - value for name, value in before.items()}
    layers = {name: module for name, module in trainer.network.named_modules() if hasattr(module, "get_delta_weight")}
    assert len(layers) == 2
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert 0 < expected.abs().max() < 2**-9 * layer.weight.abs().max()  # bfloat16 would lose it
        changed = changes[name.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(changed, expected, atol=1e-7, rtol=1e-2)


def test_activation_checkpointing_changes_no_weight_and_stays_in_the_configuration(tmp_path):
    config = tiny_config(tmp_path, max_steps=1, activation_checkpointing=True)
    for _ in range(2):  # a second trainer with the same configuration has it as well
        trainer = DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), config)
        assert trainer.network.gradient_checkpointing
    copied = weakref.ref(copy.deepcopy(trainer.skeleton))
    assert copied() is None  # copies hold no reference to themselves
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "training_args.json").read_text())["activation_checkpointing"] is True
    assert_same_weights(trainer.network, trained(tmp_path).network)


def lora(*targets, **kwargs):
    return LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets, **kwargs)


def adapted_by_peft():
    pipeline, config = tiny_pipeline(), lora("qkv", "fc1", rank_pattern={"fc1": 4}, modules_to_save=["linear"])
    pipeline.transformer = get_peft_model(pipeline.transformer, config, "style").requires_grad_(False)
    return pipeline


def adapted_by_diffusers(part="transformer", names=("style",)):
    torch.manual_seed(0)
    pipeline = sd3()
    for name in names:
        targets = ("q_proj",) if part == "text_encoder" else ("to_q", "to_k")
        getattr(pipeline, part).add_adapter(lora(*targets, use_dora=True), name)
    return pipeline


def neutral(network, name):
    """Parameters by the names that they have without an adapter's."""
    named = network.named_parameters()
    return {key.removeprefix("base_model.model.").replace(f".{name}", ""): parameter for key, parameter in named}


@pytest.mark.parametrize("adapted", [adapted_by_peft, adapted_by_diffusers])
def test_an_adapter_that_the_network_carries_is_trained_further(tmp_path, adapted):
    data = Dataset.from_dict({"class_labels": [0, 1]} if adapted is adapted_by_peft else {"prompt": ["a", "b"]})
    settings = {**SD3, "learning_rate": 1e-2, "beta": 0.1, **SAVE_EVERY_STEP}
    networks = []
    for folder, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-1"))):
        pipeline = adapted()
        start = {key: value.clone() for key, value in neutral(pipeline.transformer, "style").items()}
        trainer = DistributionRewardTrainer(pipeline, brightness, tiny_config(tmp_path / folder, **settings), data)
        found = neutral(trainer.network, "default")
        assert found.keys() == start.keys() and all(torch.equal(found[key], start[key]) for key in start)
        trainer.train(resume)
        changed = {key for key in start if not torch.equal(found[key], start[key])}
        assert changed == {key for key, parameter in found.items() if parameter.requires_grad} and len(changed) >= 4
        assert resume or logged(trainer, "kl")[0] == 0
        trainer.save_model()
        networks.append(trainer.network)
    assert_same_weights(*networks)
    merged = weights(load_pipeline(tmp_path / "whole").transformer)
    for key, value in weights(networks[0].merge_and_unload()).items():
        torch.testing.assert_close(merged[key], value)


def velocity(network):
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 700.0])
    return network(x, torch.randn(2, 3, 32), torch.randn(2, 32), t).sample.detach()


@pytest.mark.parametrize(
    "weight", [0.5, {"transformer": {"transformer_blocks.0.": 0.0, "transformer_blocks.1.": 2.0}}]
)
def test_an_adapter_that_was_given_a_weight_is_trained_and_saved_with_it(tmp_path, weight):
    pipeline, data = adapted_by_diffusers(), Dataset.from_dict({"prompt": ["a", "b"]})
    plain = velocity(pipeline.transformer)
    pipeline.set_adapters("style", weight)
    expected = velocity(pipeline.transformer)
    assert (expected - plain).abs().max() > 1e-3
    trainer = DistributionRewardTrainer(pipeline, brightness, tiny_config(tmp_path, **SD3), data)
    torch.testing.assert_close(velocity(trainer.network), expected)
    trainer.save_model()
    for loaded in (load_pipeline(tmp_path), sd3_with_adapter(tmp_path)):
        torch.testing.assert_close(velocity(loaded.transformer), expected, atol=1e-5, rtol=1e-4)


def sd3_with_adapter(folder):
    torch.manual_seed(0)
    pipeline = sd3()
    pipeline.load_lora_weights(str(folder / "adapter"), weight_name="pytorch_lora_weights.safetensors")
    return pipeline


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "lora_bias": True}, {"rank_pattern": {"to_k": 4}, "alpha_pattern": {"to_q": 7}}],
)
def test_factors_hold_their_whole_strength_for_programs_that_read_no_metadata(tmp_path, options):
    torch.manual_seed(0)
    pipeline, data = sd3(), Dataset.from_dict({"prompt": ["a", "b"]})
    before = weights(pipeline.transformer)
    config = LoraConfig(r=2, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_k"], **options)
    trainer = DistributionRewardTrainer(pipeline, brightness, tiny_config(tmp_path, **SD3), data, peft_config=config)
    trainer.save_model()
    factors = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    merged = weights(load_pipeline(tmp_path).transformer)
    layers = {key.split(".lora_")[0] for key in factors if ".lora_" in key}
    assert len(layers) == 4
    for layer in layers:
        change = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        name = layer.removeprefix("transformer.") + ".weight"
        torch.testing.assert_close(merged[name] - before[name], change, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(velocity(sd3_with_adapter(tmp_path).transformer), velocity(trainer.network))


def test_an_adapter_of_a_quantized_network_is_saved_alone(tmp_path):
    for quantizer, names in ((None, {"adapter", "transformer"}), (SimpleNamespace(is_trainable=True), {"adapter"})):
        pipeline = tiny_pipeline()
        pipeline.transformer.hf_quantizer = quantizer  # diffusers' mark
        tiny_trainer(tmp_path, pipeline, peft_config=LoraConfig(r=2)).save_model()
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == names
        assert ("load_pipeline(" in (tmp_path / "README.md").read_text()) == ("transformer" in names)


def fused():
    pipeline = adapted_by_diffusers()
    pipeline.transformer.fuse_lora()
    return pipeline


@pytest.mark.parametrize(
    ("adapted", "peft_config", "message"),
    [
        (
            lambda: adapted_by_diffusers("text_encoder"),
            None,
            "text_encoder carries an adapter, but is not trained: ",
        ),
        (adapted_by_diffusers, lora("to_q"), "has an adapter: pass no peft_config to train it further, or fold it in"),
        (lambda: adapted_by_diffusers(names="ab"), None, "adapters, a, b, are fused, off, or several: fold it in"),
        (fused, None, "adapters, style, are fused, off, or several: fold it in"),
    ],
)
def test_adapters_that_would_be_lost_or_added_twice_are_refused(tmp_path, adapted, peft_config, message):
    data = Dataset.from_dict({"prompt": ["a"] * 4})
    with pytest.raises(ValueError, match=message):
        DistributionRewardTrainer(adapted(), brightness, tiny_config(tmp_path), data, peft_config=peft_config)


def test_a_configuration_of_an_adapter_is_only_read_and_grouped_convolutions_are_refused(tmp_path):
    config = LoraConfig(r=4, task_type="FEATURE_EXTRACTION")
    before = copy.deepcopy(config.to_dict())
    tiny_trainer(tmp_path, peft_config=config)
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="adapter of a grouped convolution, Conv2d.*exclude_modules"):
        prepare_network(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), tiny_config(tmp_path), lora("0"))
