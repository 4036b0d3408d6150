# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.

import pytest
import torch

from tests.helpers import tiny_sit
from trl_distreward import SiTTransformer2DModel


def test_xl_matches_the_published_network():
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_size("XL/2")
    keys = set(model.state_dict())
    assert len(keys) == 292
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    block = {
        f"blocks.27.{name}.{kind}"
        for name in ("adaLN_modulation.1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    others = {"pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight"}
    assert block | others | {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias"} <= keys
    assert model.y_embedder.embedding_table.weight.shape == (1001, 1152)
    assert model.final_layer.linear.weight.shape == (32, 1152)  # patch² x (velocity, sigma) x 4 channels


@pytest.mark.parametrize(("size", "millions"), [("S/2", 33), ("B/2", 131), ("L/2", 458)])
def test_sizes_are_those_of_the_paper(size, millions):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_size(size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_sigma_channels_do_not_change_the_velocity():
    model = tiny_sit(learn_sigma=True)
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2])
    before = model(x, t, labels).sample
    assert before.shape == x.shape
    sigma_rows = torch.arange(8) % 2 == 1  # per patch pixel: velocity channel, sigma channel
    with torch.no_grad():
        model.final_layer.linear.weight[sigma_rows] += 1.0
    assert torch.equal(model(x, t, labels).sample, before)


def test_labels_are_dropped_in_training_only():
    model = tiny_sit(class_dropout_prob=1.0)
    x, t = torch.randn(2, 1, 4, 4), torch.rand(2)
    labels, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    assert torch.equal(model.train()(x, t, labels).sample, model.eval()(x, t, null).sample)
    assert not torch.equal(model(x, t, labels).sample, model(x, t, null).sample)


def test_gradient_checkpointing_changes_no_gradient():
    model, checkpointed = tiny_sit(), tiny_sit()
    checkpointed.enable_gradient_checkpointing()
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2])
    for network in (model, checkpointed):
        network(x, t, labels).sample.square().sum().backward()
    for a, b in zip(model.parameters(), checkpointed.parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a.grad, b.grad)


def test_an_unknown_size_and_a_patch_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="size='XXL/2'"):
        SiTTransformer2DModel.from_size("XXL/2")
    with pytest.raises(ValueError, match="patch_size=2 must divide sample_size=5"):
        tiny_sit(sample_size=5)
