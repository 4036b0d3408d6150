# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from torch import nn

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
def test_sizes(size, millions):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_size(size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_unpatchify_inverts_patching():
    model = tiny_sit(sample_size=8, in_channels=3)
    x = torch.randn(2, 3, 8, 8)
    patches = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (B, patches, C p p)
    tokens = patches.view(2, 16, 3, 4).transpose(2, 3).reshape(2, 16, 12)  # channels last, as in the output layer
    assert torch.equal(model.unpatchify(tokens), x)


def test_position_embedding_tells_rows_from_columns():
    embedding = tiny_sit(sample_size=8).pos_embed[0].view(4, 4, 16)
    assert torch.equal(embedding[:, 2, :8], embedding[:1, 2, :8].expand(4, -1))  # first half: the column
    assert torch.equal(embedding[2, :, 8:], embedding[2, :1, 8:].expand(4, -1))  # second half: the row
    assert len({tuple(row) for row in embedding.view(16, 16).tolist()}) == 16


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
    model = tiny_sit()
    other = copy.deepcopy(model)
    other.enable_gradient_checkpointing()
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2])
    for network in (model, other):
        network.eval()(x, t, labels).sample.square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiTTransformer2DModel.from_size("XXL/2"), "size='XXL/2'"),
        (lambda: tiny_sit(sample_size=5), "patch_size=2 must divide sample_size=5"),
        (lambda: tiny_sit(num_attention_heads=3), "num_attention_heads=3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
