# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Compare with recorded samples of the original SiT code (github.com/willisma/SiT), with the same weights and noise.

The numbers are `latents[:, :, 1, 2]` of two samples; docs/howto/imagenet.md tells how they were recorded.
"""

import pytest
import torch

from tests.helpers import tiny_pipeline
from trl_distreward import ClassConditionalPolicy
from trl_distreward.generation import SamplingSchedule, sample
from trl_distreward.policies import to_uint8

# settings of ours, and samples without guidance and with guidance 4 on three channels
RECORDED = {
    "sde, 250 steps": (
        {"sampler": "sde", "num_inference_steps": 250},
        [-0.08132, 0.51331, 0.63557, 0.41691, -0.39409, 0.74948, 0.66662, -0.31061],
        [-0.08027, 0.57008, 0.59986, 0.41744, -0.44591, 0.70237, 0.69647, -0.31775],
    ),
    "sde, 50 steps": (
        {"sampler": "sde", "num_inference_steps": 50},
        [-0.06895, 0.81100, 1.29186, -0.16343, -0.69880, 0.72217, 0.83847, 0.15144],
        [-0.07641, 0.85353, 1.24859, -0.16253, -0.74767, 0.68649, 0.85621, 0.14465],
    ),
    "euler": (
        {"num_inference_steps": 49},
        [-0.35432, 0.86136, -0.82155, 0.17926, -0.48360, 2.09165, -0.29983, 0.78418],
        [-0.35114, 0.91715, -0.85131, 0.18026, -0.52768, 2.06194, -0.28714, 0.77830],
    ),
    "heun2": (
        {"num_inference_steps": 49, "solver": "heun2"},
        [-0.35371, 0.86138, -0.82216, 0.17843, -0.48349, 2.09236, -0.29985, 0.78332],
        [-0.35056, 0.91726, -0.85185, 0.17945, -0.52757, 2.06264, -0.28709, 0.77734],
    ),
    "dopri5": (
        {"solver": "dopri5"},
        [-0.35372, 0.86116, -0.82207, 0.17836, -0.48366, 2.09232, -0.29983, 0.78335],
        [-0.35057, 0.91705, -0.85178, 0.17939, -0.52775, 2.06252, -0.28702, 0.77739],
    ),
}


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", RECORDED)
def test_pipeline_and_policy_sample_as_the_original_code(name, guided):
    kwargs, *recorded = RECORDED[name]
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    # its steps depend on errors near float32's rounding, and in the original on the other half of a guided batch
    tolerance = 1e-4 if name == "dopri5" else 2e-5
    pipeline, labels = tiny_pipeline(in_channels=4, learn_sigma=True), torch.tensor([0, 2])
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    scale, channels = (4.0, 3) if guided else (1.0, None)
    given = {"latents": noise, "generator": torch.Generator().manual_seed(8), "output_type": "latent", **kwargs}
    images = pipeline(labels, scale, guidance_channels=channels, **given).images
    expected = torch.tensor(recorded[guided]).view(2, 4)
    torch.testing.assert_close(images[:, :, 1, 2], expected, atol=tolerance, rtol=0)

    if name == "heun2":
        return  # a solver of the pipeline alone
    policy = ClassConditionalPolicy(pipeline, scale, channels)
    policy.noise = lambda conditions, generator: noise
    options = {"sampler": "ode", "solver": "euler", "num_inference_steps": 1, **kwargs}
    last = 0.04 if options["sampler"] == "sde" else None
    steps = options.pop("num_inference_steps")
    schedule = SamplingSchedule(steps, last_step_size=last, **options)
    samples = sample(policy, policy.model, labels, schedule, torch.Generator().manual_seed(8)).sample
    torch.testing.assert_close(samples[:, :, 1, 2], expected, atol=tolerance, rtol=0)


def test_images_are_rounded_as_in_the_original_code():
    samples = torch.linspace(-1.3, 1.3, 1_000_001)
    scaled = 127.5 * samples.double() + 128
    inside = (scaled - scaled.round()).abs() > 1e-4  # at a boundary float32 decides
    images = to_uint8(tiny_pipeline().decode(samples))
    assert torch.equal(images[inside], scaled.clamp(0, 255).to(torch.uint8)[inside])
    assert inside.float().mean() > 0.999
