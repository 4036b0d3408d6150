# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from tests.edm2 import TINY, fill_with_pattern, pattern, tiny_edm2
from tests.helpers import trained
from trl_distreward import EDM2Pipeline, EDM2UNet2DModel
from trl_distreward.models.edm2 import MPLayer

# every 48th number of the original code's output for the same weights and input, with labels and without
ORIGINAL = [
    *(0.41800159, -0.44366232, -0.30273217, 0.53444582, 0.00714153, 0.24398839),
    *(-0.4936322, 0.01229098, 0.29883829, 0.03985866, -0.1767821, 0.58966392),
]
ORIGINAL_WITHOUT_LABELS = [0.41364715, -0.2906262, 0.01907441, -0.47208971, 0.36135396, -0.00969603]
ORIGINAL_UNCERTAINTY = [-0.1868006, -0.14116628, -0.10275903]


def inputs():
    sigma = torch.tensor([0.05, 1.7, 40.0])
    return pattern((3, 3, 8, 8), 1.0) * (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1), sigma, torch.tensor([0, 3, 4])


@torch.no_grad()
def test_output_matches_the_original_code():
    model, (z, sigma, labels) = fill_with_pattern(EDM2UNet2DModel(**TINY).eval()), inputs()
    assert model(z, sigma, labels).sample.flatten()[::48].tolist() == pytest.approx(ORIGINAL, abs=1e-5)
    assert model(z, sigma).sample.flatten()[::96].tolist() == pytest.approx(ORIGINAL_WITHOUT_LABELS, abs=1e-5)
    assert model.uncertainty(sigma).tolist() == pytest.approx(ORIGINAL_UNCERTAINTY, abs=1e-5)


PARAMETERS = {
    "XXS": 31_309_029,
    "XS": 124_713_253,
    "S": 280_212_837,
    "M": 497_807_781,
    "L": 777_498_085,
    "XL": 1_119_283_749,
    "XXL": 1_523_164_773,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_match_the_published_networks(size):
    with torch.device("meta"):
        model = EDM2UNet2DModel.from_size(size)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    keys = model.state_dict()
    assert len(keys) == 203 and len(list(model.buffers())) == 4
    assert sum(value.ndim == 0 for value in keys.values()) == 37
    assert {"unet.enc.64x64_conv.weight", "unet.dec.8x8_in0.attn_qkv.weight", "logvar_linear.weight"} <= set(keys)


def test_size_of_weights_has_no_effect_and_stays():
    model, (z, sigma, labels) = tiny_edm2(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.mul_(3)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(z, sigma, labels).sample
    for mode in (True, False):
        model.train(mode)(z, sigma, labels)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.normalize_weights()
    rms = {name: p.square().mean().sqrt().item() for name, p in model.named_parameters() if p.ndim}
    assert all(value == pytest.approx(1, abs=1e-3) for value in rms.values())
    torch.testing.assert_close(model(z, sigma, labels).sample, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "backprop", "sampler": "ode", "backprop_from": 0.6}])
def test_weights_are_normalized_after_every_step_if_asked(tmp_path, settings):
    settings |= {"reference_update": "rolling", "top_advantage_quantile": 1.0, "num_subsets": 12, "replace_size": 1}

    def longest(forced):
        network = tiny_edm2(in_channels=1, sample_size=4, forced_weight_normalization=forced)
        network.unet.out_conv.weight.data.mul_(3)
        trainer = trained(tmp_path, model=EDM2Pipeline(network), max_steps=2, learning_rate=1e-2, **settings)
        layers = [module for module in trainer.network.modules() if isinstance(module, MPLayer)]
        return max((layer.weight - layer.unit_weight()).abs().max().item() for layer in layers)

    assert longest(forced=True) < 1e-3 < 1e-2 < longest(forced=False)


def test_gradient_checkpointing_changes_no_gradient():
    model, checkpointed = tiny_edm2(), tiny_edm2()
    checkpointed.enable_gradient_checkpointing()
    for network in (model, checkpointed):
        network(*inputs()).sample.square().sum().backward()
    compared = [(a.grad, b.grad) for a, b in zip(model.parameters(), checkpointed.parameters(), strict=True)]
    assert sum(a is None for a, _ in compared) == 1  # that of the uncertainty, which is not trained
    assert all(torch.equal(a, b) for a, b in compared if a is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_and_frequencies_stay_in_float32(tmp_path, dtype):
    model, (z, sigma, labels) = tiny_edm2(), inputs()
    model.save_pretrained(tmp_path)
    loaded = EDM2UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype and loaded.unet.out_gain.dtype == loaded.unet.emb_fourier.freqs.dtype == torch.float32
    with torch.no_grad():
        expected, actual = model(z, sigma, labels).sample, loaded(z, sigma, labels).sample
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(z, sigma, labels).sample
    assert actual.dtype == autocast.dtype == torch.float32
    for half in (actual, autocast):
        assert 0 < (half - expected).abs().max() < 0.1
