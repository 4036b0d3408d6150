# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Adapters that are trained here, in diffusers: for every family, of every kind, and on quantized networks."""

import dataclasses
import importlib.util

import diffusers
import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from tests.helpers import tiny_config, tiny_pipeline, tiny_trainer
from tests.policies_tiny import TEXT_FAMILIES, sd3
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, weights
from tests.test_policy_families import build, called
from trl_distreward import DistributionRewardTrainer, load_pipeline
from trl_distreward.policies import as_policy

pytestmark = pytest.mark.slow

FILE = {"subfolder": "adapter", "weight_name": "pytorch_lora_weights.safetensors"}
SETTINGS = {"time_grid": "auto", "last_step_size": 0, "num_inference_steps": 2, "learning_rate": 1e-2, "max_steps": 1}


def brightness(images, **kwargs):
    return images.float().mean((1, 2, 3))


def trained(model, folder, prompts=("a cat", "a dog"), seed=0, config=None, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False) if config is None else config
    data, args = Dataset.from_dict({"prompt": list(prompts)}), tiny_config(folder, seed=seed, **SETTINGS | settings)
    return DistributionRewardTrainer(model, brightness, args, data, peft_config=config)


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=lambda family: family.name)
def test_an_adapter_loads_fuses_unfuses_and_combines(tmp_path, family):
    if not hasattr(build(family), "load_lora_weights"):
        pytest.skip("diffusers' pipeline loads no adapters")
    for seed, name in enumerate("ab"):
        trainer = trained(
            as_policy(build(family), **family.options), tmp_path / name, family.conditions, seed, max_steps=1
        )
        trainer.train()
        trainer.save_model()
    part = trainer.policy.component
    pipeline = build(family)
    network, before = getattr(pipeline, part), called(family, pipeline)
    for name in "ab":
        pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name, **FILE)
        factors = load_file(tmp_path / name / "adapter" / FILE["weight_name"])
        assert all(key.startswith(f"{part}.") and ".lora_" in key for key in factors)
    pipeline.set_adapters("b")
    alone = called(family, pipeline)
    torch.testing.assert_close(alone, called(family, trainer.policy.pipeline), rtol=0, atol=1e-4)
    pipeline.fuse_lora(components=[part], adapter_names=["b"])
    torch.testing.assert_close(called(family, pipeline), alone, rtol=0, atol=1e-4)
    pipeline.unfuse_lora(components=[part])
    torch.testing.assert_close(called(family, pipeline), alone, rtol=0, atol=1e-4)
    pipeline.set_adapters(["a", "b"], adapter_weights=[0.7, 0.4])
    layer = next(module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    both = sum(layer.get_delta_weight(name) for name in "ab")
    folders = {name: load_file(tmp_path / name / "adapter" / FILE["weight_name"]) for name in "ab"}
    key = next(f"{part}.{name}" for name, module in network.named_modules() if module is layer)
    deltas = {
        n: f[f"{key}.lora_B.weight"].flatten(1) @ f[f"{key}.lora_A.weight"].flatten(1) for n, f in folders.items()
    }
    torch.testing.assert_close(both, 0.7 * deltas["a"] + 0.4 * deltas["b"], atol=1e-5, rtol=1e-4)
    assert (called(family, pipeline) - alone).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    torch.testing.assert_close(called(family, pipeline), before, rtol=0, atol=1e-4)


# Kinds of adapters that peft 0.21.2 has for layers of any network
KINDS = (
    "AdaLora Adamss BOFT Beft C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3 LNTuning LoHa LoKr Lora Miss"
)
KINDS += " OFT OSF Peanut Psoft Pvera RandLora Shira Supertuning TinyLora UniLora VBLoRA Vera WaveFT"
OPTIONS = {
    "AdaLora": {"init_r": 2, "target_r": 1, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FourierFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["fc1"]},
    "LNTuning": {"target_modules": ["proj"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "Shira": {"r": 1},
    "VBLoRA": {"num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": ["qkv"]},
    "Vera": {"target_modules": ["qkv"]},
    "WaveFT": {"n_frequency": 10},
}


@pytest.mark.parametrize("kind", KINDS.split())
def test_every_kind_of_adapter_trains_resumes_saves_and_loads(tmp_path, kind):
    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"peft {peft.__version__} has no {kind}Config")
    known = {each.name for each in dataclasses.fields(getattr(peft, f"{kind}Config"))}
    options = {"target_modules": ["qkv", "fc1"]} | ({"r": 2} if "r" in known else {}) | OPTIONS.get(kind, {})
    config = getattr(peft, f"{kind}Config")(**options)
    settings = {"learning_rate": 0.1, "max_steps": 2, **SAVE_EVERY_STEP}
    trainer = tiny_trainer(tmp_path / "run", peft_config=config, **settings)
    before = weights(trainer.network)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer.network).items())
    trainer.save_model(str(tmp_path / "saved"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 1, 4, 4, generator=generator), torch.rand(2, generator=generator), torch.tensor([0, 1])
    adapted = PeftModel.from_pretrained(tiny_pipeline().transformer, str(tmp_path / "saved" / "adapter"))
    for network in (load_pipeline(tmp_path / "saved").transformer, adapted):
        expected = trainer.network.eval()(*inputs).sample
        torch.testing.assert_close(network.eval()(*inputs).sample, expected, atol=1e-4, rtol=1e-4)
    resumed = tiny_trainer(tmp_path / "run", peft_config=config, overwrite_output_dir=True, **settings)
    resumed.train(str(tmp_path / "run" / "checkpoint-1"))
    assert_same_weights(resumed.network, trainer.network)


def int8_by_torchao():
    import torchao.quantization

    return diffusers.TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())


QUANTIZERS = {"torchao": int8_by_torchao, "optimum.quanto": lambda: diffusers.QuantoConfig("int8")}


@pytest.mark.parametrize("library", QUANTIZERS)
def test_an_adapter_of_a_quantized_network_trains_resumes_and_loads(tmp_path, library):
    if not (importlib.util.find_spec(library.partition(".")[0]) and importlib.util.find_spec(library)):
        pytest.skip(f"needs {library}")
    sd3().save_pretrained(tmp_path / "base")

    def quantized():
        half = {"torch_dtype": torch.bfloat16}
        options = {"subfolder": "transformer", "quantization_config": QUANTIZERS[library](), **half}
        network = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "base", **options)
        return diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "base", transformer=network, **half)

    def images(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipeline("a cat", num_inference_steps=2, generator=noise, output_type="pt").images

    pipeline, settings = quantized(), {"max_steps": 2, "learning_rate": 0.1, **SAVE_EVERY_STEP}
    trainer = trained(pipeline, tmp_path / "run", config=LoraConfig(r=2), **settings)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "run" / "transformer").exists()  # merged, it would be rounded
    other = quantized()
    change = (images(other) - images(pipeline)).abs().mean()
    other.load_lora_weights(str(tmp_path / "run"), **FILE)
    assert (images(other) - images(pipeline)).abs().mean() < change / 5  # which is rounded to bfloat16
    resumed = trained(quantized(), tmp_path / "again", config=LoraConfig(r=2), **settings)
    resumed.train(str(tmp_path / "run" / "checkpoint-1"))
    for name, value in trainer.network.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, resumed.network.get_parameter(name)), name


@pytest.mark.parametrize(("name", "library"), [("adamw_torch_8bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")])
def test_an_optimizer_in_eight_bits_trains_and_resumes_exactly(tmp_path, name, library):
    pytest.importorskip(library)
    whole, resumed = (
        tiny_trainer(tmp_path / folder, tiny_pipeline(hidden_size=64), optim=name, max_steps=2, **SAVE_EVERY_STEP)
        for folder in ("whole", "resumed")
    )
    whole.train()
    resumed.train(str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_weights(resumed.network, whole.network)
    states = [value for state in whole.optimizer.optimizer.state.values() for value in state.values()]
    assert any(
        "8bit" in type(value).__name__ or value.dtype == torch.uint8 for value in states if torch.is_tensor(value)
    )
