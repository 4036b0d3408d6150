# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sampling never waits for the device: no step reads a value from it, or sends one but noise drawn on the host.

A step that does shows in the counts on any device. On the meta device, which has no values, reading one is an error,
and what is sent to it is counted as on a GPU.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import tiny_pipeline
from tests.policies_tiny import TEXT_FAMILIES, Family, dit
from trl_distreward.generation import SamplingSchedule, image_generators, sample
from trl_distreward.policies import as_policy

READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
SIT = Family("sit", tiny_pipeline, lambda: None, [0, 2, 1])
DIT = Family("dit", dit, lambda: None, [0, 2, 1])
# Lumina 2's network itself, in diffusers, reads its prompts' lengths at every call
SKIPPED = ("lumina2", "sd2-v", "flux-distilled")
FAST = ("sdxl", "sd3", "z-image")
TEXT = [
    pytest.param(family, id=family.name, marks=() if family.name in FAST else pytest.mark.slow)
    for family in TEXT_FAMILIES
    if family.name not in SKIPPED
]
# Qwen-Image's network sends its frequencies at every call, Z-Image's takes lists of lengths that the policy reads once
IN_DIFFUSERS = ("qwen-image", "z-image")


class Transfers(TorchDispatchMode):
    """Counts operations that read from a device, and blocking copies between two."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in READING or any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks):
            self.counts[name] += 1
        out = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, blocking = args[name == "copy_"], not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if source.device != out.device and blocking:
                self.counts["copy"] += 1
        return out


@pytest.fixture
def transfers(monkeypatch):
    """Of sampling with so many steps."""
    counts: Counter = Counter()

    def counting(method, name):
        def counted(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        return counted

    for name in ("cpu", "numpy", "tolist"):  # on the CPU nothing is copied, and nothing dispatched
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), name))

    def count(policy, conditions, num_steps, **schedule):
        counts.clear()
        generators = image_generators(0, "rollout", 0, range(len(conditions)))
        keep = () if schedule.get("sampler") == "ode" else (0, 1)
        with Transfers() as mode:
            sample(policy, policy.model, conditions, SamplingSchedule(num_steps, **schedule), generators, keep)
        return mode.counts + counts

    return count


@pytest.mark.parametrize("family", [pytest.param(SIT, id="sit"), pytest.param(DIT, id="dit"), *TEXT])
def test_no_step_reads_from_the_device_or_waits_for_it(family, transfers):
    policy = as_policy(family.build(), **{"guidance_scale": 3.0, **family.options})
    transfers(policy, family.conditions, 2)  # prompts are embedded, and kept in CPU memory
    few, many = (transfers(policy, family.conditions, steps) for steps in (2, 4))
    assert few == many
    if family.name in IN_DIFFUSERS:
        return
    policy.model.to("meta")
    policy.to(torch.device("meta"))
    transfers(policy, family.conditions, 2)
    for schedule in ({}, {"sampler": "ode", "solver": "heun"}):
        few, many = (transfers(policy, family.conditions, steps, **schedule) for steps in (2, 4))
        assert few == many
        assert few["copy"] <= 1  # the conditions


def test_the_prompts_of_another_batch_are_read(transfers):
    family = TEXT_FAMILIES[0]
    policy = as_policy(family.build())
    one, other = policy.encode(["a", "b c"]), policy.encode(["d"])
    assert policy.prompts(one["prompt"]) == ["a", "b c"] and policy.prompts(other["prompt"]) == ["d"]
    assert policy.prompts(one["prompt"][1:]) == ["b c"]


def test_attention_of_sit_is_the_fused_one(monkeypatch):
    pipeline = tiny_pipeline()
    calls, fused = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a: calls.append(1) or fused(*a))
    policy = as_policy(pipeline)
    sample(policy, policy.model, [0, 1], SamplingSchedule(3))
    assert len(calls) == 3 * pipeline.transformer.config.num_layers
