# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sampling never waits for the device: no step reads a value from it, and none sends one in a blocking copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import tiny_pipeline
from tests.policies_tiny import TEXT_FAMILIES, Family, dit
from trl_distreward.generation import SamplingSchedule, image_generators, sample
from trl_distreward.policies import as_policy

LABELLED = [Family("sit", tiny_pipeline, lambda: None, [0, 2, 1]), Family("dit", dit, lambda: None, [0, 2, 1])]
PROMPTED = [family for family in TEXT_FAMILIES if family.name in ("sdxl", "pixart-sigma", "sd3", "sana", "flux")]


class BlockingCopies(TorchDispatchMode):
    """Counts blocking copies between two devices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        out = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.count += args[name == "copy_"].device != out.device
        return out


@pytest.mark.parametrize("family", LABELLED + PROMPTED, ids=lambda family: family.name)
@pytest.mark.parametrize("schedule", [{}, {"sampler": "ode", "solver": "heun"}], ids=["sde", "ode"])
def test_no_step_reads_from_the_device_or_waits_for_it(family, schedule):
    """On the meta device, which has no values, reading one is an error."""
    policy = as_policy(family.build(), guidance_scale=3.0, **family.options)
    policy.inputs(policy.encode(family.conditions), guided=True)  # embeds prompts while there are values
    # the policy's grid, which a trainer asks for once
    schedules = [SamplingSchedule(steps, last_step_size=0, **schedule).on(policy) for steps in (2, 2, 4)]
    policy.model.to("meta")
    policy.to(torch.device("meta"))
    counts = []
    for bound in schedules:  # the first time, embeddings are sent and kept
        generators = image_generators(0, "rollout", 0, range(len(family.conditions)))
        keep = () if schedule else (0, 1)
        with BlockingCopies() as copies:
            sample(policy, policy.model, family.conditions, bound, generators, keep)
        counts.append(copies.count)
    assert counts[1] == counts[2] <= 1  # the conditions
