# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.edm2 import tiny_edm2
from tests.helpers import tiny_sit
from trl_distreward import EMANet
from trl_distreward.merging.coefficients import (
    COEFFICIENT_MAPS,
    coefficient_groups,
    coefficients_of,
    gaussian_log_prob,
    gaussian_samples,
    initial_coefficients,
    samples_of,
)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_network_starts_at_the_initial_mean_and_learns(num_layers):
    initial = torch.randn(2, 4, dtype=torch.float64)
    network = EMANet(initial, num_layers=num_layers, scale=0.1)
    assert torch.equal(network(), initial)
    target, optimizer = initial + 0.1 * torch.randn(2, 4), torch.optim.Adam(network.parameters(), 1e-2)
    before = ((network() - target) ** 2).sum().item()
    for _ in range(300):
        loss = ((network() - target) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2 * before


@pytest.mark.parametrize("coefficient_map", COEFFICIENT_MAPS)
def test_maps_have_inverses_and_keep_the_sum(coefficient_map):
    samples = torch.randn(5, 2, 6, dtype=torch.float64)
    coefficients = coefficients_of(samples, coefficient_map)
    again = coefficients_of(samples_of(coefficients, coefficient_map), coefficient_map)
    torch.testing.assert_close(again, coefficients, atol=1e-15, rtol=1e-13)
    if coefficient_map != "none":
        torch.testing.assert_close(coefficients.sum(-1), torch.ones(5, 2, dtype=torch.float64))
    if coefficient_map == "softmax":
        assert (coefficients > 0).all()


def test_affine_coefficients_are_the_nearest_that_sum_to_one():
    samples = torch.randn(6, dtype=torch.float64)
    coefficients = coefficients_of(samples, "affine")
    directions = torch.randn(20, 6, dtype=torch.float64)
    others = coefficients + directions - directions.mean(dim=1, keepdim=True)
    assert ((others - samples).norm(dim=1) > (coefficients - samples).norm()).all()


def test_coefficients_outside_of_a_maps_range_are_refused():
    last = initial_coefficients("last", 3)
    for coefficients, coefficient_map, message in (
        (last, "softmax", "be positive with 'softmax'"),
        (torch.tensor([0.5, 0.7]), "affine", "must sum to one"),
    ):
        with pytest.raises(ValueError, match=message):
            samples_of(coefficients, coefficient_map)
    assert torch.equal(samples_of(last, "affine"), last)


@pytest.mark.parametrize(
    ("given", "count", "options", "expected"),
    [
        ("uniform", 4, {}, [0.25] * 4),
        ("last", 3, {}, [0.0, 0.0, 1.0]),
        ([0.5, -0.5, 1.0], 3, {}, [0.5, -0.5, 1.0]),
        # a stored average with the target's width is the answer
        ("post_hoc", 2, {"times": [5.0, 5.0], "stds": [0.05, 0.1], "target_std": 0.05}, [1.0, 0.0]),
    ],
)
def test_the_start_is_what_was_asked_for(given, count, options, expected):
    assert initial_coefficients(given, count, **options).tolist() == pytest.approx(expected, abs=1e-9)


def test_a_post_hoc_start_favours_late_checkpoints_and_needs_a_time_for_each():
    power = initial_coefficients("post_hoc", 5, target_std=0.1)
    assert power.sum().item() == pytest.approx(1) and (power.diff() > 0).all()
    with pytest.raises(ValueError, match="checkpoint_times has 2 entries for 3"):
        initial_coefficients("post_hoc", 3, times=[1.0, 2.0])


def test_groups_cover_every_tensor():
    keys = list(tiny_sit().state_dict())
    for granularity, some in (
        ("per_model", {"all"}),
        ("per_block", {"blocks.0", "blocks.1", "x_embedder", "final_layer"}),
        ("per_parameter_group", {"blocks.#.attn.qkv", "x_embedder.proj", "final_layer.linear"}),
    ):
        groups, names = coefficient_groups(keys, granularity)
        assert list(groups) == keys and set(groups.values()) == set(range(len(names)))
        assert some <= set(names)
    outside = {name for name in coefficient_groups(keys, "per_block")[1] if not name.startswith("blocks.")}
    assert not any("." in name for name in outside)  # t_embedder.mlp.0 and .2 are no blocks


def test_edm2_blocks_are_separate_groups():
    keys = list(tiny_edm2().state_dict())
    names = coefficient_groups(keys, "per_block")[1]
    blocks = {key[: key.index("block") + len("block0")] for key in keys if "_block" in key}
    assert len(blocks) > 3 and blocks < set(names)
    assert "unet" in names  # tensors outside of blocks


@pytest.mark.parametrize("granularity", ["per_block", "per_parameter_group"])
def test_lora_factors_are_grouped_like_the_weights_they_adapt(granularity):
    plain = ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "y.weight"]
    endings = {"y.weight": ("lora_embedding_A", "lora_embedding_B")}
    factors = [
        (key, f"base_model.model.{key.removesuffix('weight')}{ending}")
        for key in plain
        for ending in endings.get(key, ("lora_A.weight", "lora_B.weight"))
    ]
    of_weight, names = coefficient_groups(plain, granularity)
    of_factor, names_of_factors = coefficient_groups([factor for _, factor in factors], granularity)
    assert names_of_factors == names and len(names) == 3
    assert all(of_factor[factor] == of_weight[key] for key, factor in factors)


def test_names_without_blocks_are_refused():
    with pytest.raises(ValueError, match="finds one block only, 'net', as"):
        coefficient_groups(["net.first.weight", "net.second.weight"], "per_block")


def test_antithetic_samples_are_pairs_around_the_mean():
    mean = torch.randn(1, 3, dtype=torch.float64)
    samples = gaussian_samples(mean, 0.5, 6, torch.Generator().manual_seed(0), antithetic=True)
    torch.testing.assert_close(samples[:3] + samples[3:], 2 * mean.expand(3, 1, 3))
    assert len(gaussian_samples(mean, 0.5, 7, torch.Generator(), antithetic=True)) == 7
    plain = gaussian_samples(mean, 0.5, 4000, torch.Generator().manual_seed(0))
    assert plain.std(dim=0).sub(0.5).abs().max() < 0.03 and (plain.mean(dim=0) - mean).abs().max() < 0.03


def test_log_prob_matches_torch():
    mean = torch.randn(2, 3, dtype=torch.float64)
    samples = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, 0.7).log_prob(samples).sum((1, 2))
    torch.testing.assert_close(gaussian_log_prob(samples, mean, 0.7), expected)
