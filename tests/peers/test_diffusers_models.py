# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Our networks under the mixins that test diffusers' own models."""

import pytest
import torch
from peft import LoraConfig

from tests.edm2 import TINY
from tests.peers import diffusers_tests
from trl_distreward import EDM2UNet2DModel, SiTTransformer2DModel

pytestmark = pytest.mark.slow

mixins = diffusers_tests("models.testing_utils")
DEVICE = mixins.common.torch_device


class RandomSiT(SiTTransformer2DModel):
    """A SiT whose adapters change its output, which a new one multiplies by zero."""

    def initialize_weights(self):
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.1)


class SiTConfig(mixins.BaseModelTesterConfig):
    model_class = RandomSiT
    main_input_name = "hidden_states"
    output_shape = (4, 8, 8)
    model_split_percents = [0.5, 0.7]

    def get_init_dict(self):
        sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
        return {**sizes, "num_classes": 4, "class_dropout_prob": 0.0}

    def get_dummy_inputs(self):
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, generator=generator)
        return {
            "hidden_states": x.to(DEVICE),
            "timestep": t.to(DEVICE),
            "class_labels": torch.tensor([0, 3]).to(DEVICE),
        }


class EDM2Config(mixins.BaseModelTesterConfig):
    model_class = EDM2UNet2DModel
    main_input_name = "sample"
    output_shape = (3, 8, 8)
    model_split_percents = [0.5, 0.7]

    def get_init_dict(self):
        return dict(TINY)

    def get_dummy_inputs(self):
        z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        sigma, labels = torch.tensor([0.5, 4.0]), torch.tensor([0, 3])
        return {"sample": z.to(DEVICE), "timestep": sigma.to(DEVICE), "class_labels": labels.to(DEVICE)}


@pytest.fixture(autouse=True)
def names_of_projections(monkeypatch):
    """Their tests adapt `to_q`, `to_k`, `to_v` and `to_out.0`: SiT has one layer for the first three."""
    lora, names = diffusers_tests("models.testing_utils.lora"), {"to_q": "qkv", "to_k": "proj", "to_out.0": "proj"}

    def translated(target_modules, **options):
        return LoraConfig(target_modules=[names.get(name, name) for name in target_modules], **options)

    monkeypatch.setattr(lora, "LoraConfig", translated)


class TestSiT(SiTConfig, mixins.ModelTesterMixin):
    pass


class TestSiTMemory(SiTConfig, mixins.MemoryTesterMixin):
    pass


class TestSiTTraining(SiTConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"RandomSiT"})


class TestSiTAttention(SiTConfig, mixins.AttentionTesterMixin):
    pass


class TestSiTAttentionBackend(SiTConfig, mixins.AttentionBackendTesterMixin):
    pass


class TestSiTCompile(SiTConfig, mixins.TorchCompileTesterMixin):
    pass


class TestSiTLora(SiTConfig, mixins.LoraTesterMixin):
    def test_correct_lora_configs_with_different_ranks(self):
        pytest.skip("not applicable: looks for a layer named to_k")


class TestSiTHotSwap(SiTConfig, mixins.LoraHotSwappingForModelTesterMixin):
    pass


class TestEDM2(EDM2Config, mixins.ModelTesterMixin):
    pass


class TestEDM2Memory(EDM2Config, mixins.MemoryTesterMixin):
    pass


class TestEDM2Training(EDM2Config, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"EDM2UNet"})


class TestEDM2AttentionBackend(EDM2Config, mixins.AttentionBackendTesterMixin):
    pass


class TestEDM2Compile(EDM2Config, mixins.TorchCompileTesterMixin):
    def test_torch_compile_repeated_blocks(self):
        super().test_torch_compile_repeated_blocks(recompile_limit=16)  # the blocks of a U-Net differ in shape
