# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What diffusers offers for any model works for ours."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

from tests.edm2 import tiny_edm2
from tests.helpers import tiny_sit

Z, LABELS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
CASES = {
    "sit": (lambda: tiny_sit(sample_size=8, in_channels=4), torch.tensor([0.3, 0.9])),
    "edm2": (lambda: tiny_edm2(in_channels=4), torch.tensor([0.5, 4.0])),
}


@pytest.fixture(params=CASES)
def case(request):
    make, times = CASES[request.param]
    return make(), lambda model: model(Z, times, LABELS).sample


@pytest.mark.parametrize("kind", ["accelerate", "leaf_level", "block_level"])
@torch.no_grad()
def test_offloaded_weights_give_the_same_output(case, kind, tmp_path):
    model, run = case
    expected = run(model)
    if kind == "accelerate":
        cpu_offload(model, torch.device("cpu"))
    else:  # a weight that is still on the disk is uninitialized memory
        model.enable_group_offload(
            "cpu", offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
    assert torch.equal(run(model), expected)


def test_layers_store_weights_in_eight_bits_and_still_train(case):
    model, run = case
    expected, size, trained = run(model).detach(), model.get_memory_footprint(), list(model.parameters())
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert model.get_memory_footprint() < 0.3 * size and model.dtype == torch.float32
    output = run(model)
    assert 0 < (output - expected).abs().max() < 0.2 * expected.abs().max()
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained if p.requires_grad)


@torch.no_grad()
def test_a_model_compiles_to_one_graph(case):
    model, run = case
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="eager")), run(model))


@torch.no_grad()
def test_the_chosen_attention_backend_is_called(case, monkeypatch):
    model, run = case
    expected, chosen = run(model), AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, chosen, lambda query, **options: 0 * query)
    with attention_backend("native"):  # restores what the model sets
        model.set_attention_backend(chosen.value)
        assert not torch.equal(run(model), expected)
    model.reset_attention_backend()
    assert torch.equal(run(model), expected)
