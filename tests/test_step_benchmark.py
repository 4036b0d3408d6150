# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Arithmetic of `benchmarks/step.py`."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("step")


def test_counted_operations_match_the_matrix_products_of_the_network(step):
    depth, d, tokens, patch = 12, 384, 16, 8  # SiT-S/8: latents 4x32x32
    block = tokens * 12 * d**2 + 2 * tokens**2 * d + 6 * d**2  # qkv, projection and MLP; attention; modulation
    ends = tokens * 4 * patch**2 * d + tokens * d * 8 * patch**2 + 2 * d**2
    times = 256 * d + d**2
    forward, both = step.counted_flops("S/8")
    assert forward == 2 * (depth * block + ends + times)
    assert 2.9 < both / forward < 3.1


@pytest.mark.parametrize(("budget", "expected"), [(1e9, (128, 50, 50)), (4000, (5, 50, 50)), (20, (4, 1, 17))])
def test_the_step_is_cut_to_the_budget(step, budget, expected):
    args = step.make_parser().parse_args(["--budget", str(budget)])
    cut = step.within_budget(args, {"rollout": 4.0, "reward": 0.5, "update": 0.5})
    assert (cut.subsets, cut.replace_size, cut.steps) == expected and args.subsets == 128
    cost = args.updates * cut.subsets * cut.replace_size * 5 + cut.reference_set * 4
    assert cut.reference_set > cut.replace_size and cost * cut.steps / 50 <= budget + 10
