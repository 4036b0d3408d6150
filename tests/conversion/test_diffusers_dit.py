# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tests.helpers import tiny_pipeline, tiny_sit, tiny_vae
from trl_distreward import SiTPipeline
from trl_distreward.conversion import to_diffusers_dit, to_diffusers_pipeline
from trl_distreward.conversion.diffusers_dit import timestep_map
from trl_distreward.policies import as_policy

LATENT = {"in_channels": 4, "sample_size": 8, "hidden_size": 32}


@pytest.mark.parametrize("config", [{"learn_sigma": True}, {"patch_size": 4, "num_layers": 3, "num_classes": 7}])
def test_the_same_function_to_float32_rounding(tmp_path, config):
    model = tiny_sit(**LATENT, **config)
    to_diffusers_dit(model).save_pretrained(tmp_path)
    exported = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    torch.manual_seed(1)
    steps = torch.cat([torch.tensor([0.0, 1000.0, 1.0, 500.0]), 1000 * torch.rand(124)])  # most are not whole
    x, labels = torch.randn(128, 4, 8, 8), torch.randint(0, model.config.num_classes + 1, (128,))
    with torch.no_grad():
        velocity = -model(x, 1 - steps / 1000, labels).sample
        found = exported(x, timestep=steps, class_labels=labels).sample[:, :4]
    assert velocity.abs().max() > 1
    assert (found - velocity).abs().max() < 2e-6


def test_diffusers_flow_scheduler_samples_as_the_pipeline_does():
    pipeline = tiny_pipeline(**LATENT, learn_sigma=True)
    exported, scheduler = to_diffusers_dit(pipeline.transformer), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    x, labels = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    expected = pipeline(labels, num_inference_steps=10, latents=x, output_type="latent").images
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(exported(x, t.expand(3), labels).sample[:, :4], t, x).prev_sample
    assert (x - expected).abs().max() < 5e-6


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_exported_pipeline_makes_the_same_images(tmp_path, guidance_scale):
    """Written by diffusers, loaded by diffusers, with nothing of this library: guidance needs 1000 classes."""
    pipeline = SiTPipeline(tiny_sit(**LATENT, learn_sigma=True, num_classes=1000), tiny_vae())
    labels = {3: "great white shark, man-eater", 999: "toilet tissue"}
    to_diffusers_pipeline(pipeline, labels).save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FlowMapEulerDiscreteScheduler
    chosen = loaded.get_label_ids(["man-eater", "toilet tissue"])
    assert chosen == [3, 999]
    settings = {"num_inference_steps": 7, "guidance_scale": guidance_scale}
    expected, found = (
        p(class_labels=chosen, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
        for p in (pipeline, loaded)
    )
    assert expected.shape == (2, 3, 16, 16) and expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-4


def test_pipelines_that_diffusers_cannot_have_are_refused():
    with pytest.raises(ValueError, match="has no VAE"):
        to_diffusers_pipeline(tiny_pipeline(**LATENT))
    with pytest.raises(ValueError, match="num_classes=1001: DiTPipeline would guide away"):
        to_diffusers_pipeline(SiTPipeline(tiny_sit(**LATENT, num_classes=1001), tiny_vae()))
    with pytest.raises(ValueError, match="names class 3: classes go from 0 to 2"):
        to_diffusers_pipeline(SiTPipeline(tiny_sit(**LATENT), tiny_vae()), {3: "none"})


def test_times_are_embedded_exactly_and_without_amplifying_rounding():
    matrix, steps = timestep_map(), torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.arange(128, dtype=torch.float32)
    ours, theirs = (torch.exp(-math.log(10000) * k / n).double() for n in (128, 127))
    known, wanted = steps[:, None] * 1000 * theirs, (1 - steps)[:, None] * ours
    known = torch.cat([known.cos(), known.sin(), torch.ones(500, 1, dtype=torch.float64)], dim=1)
    assert (known @ matrix - torch.cat([wanted.cos(), wanted.sin()], dim=1)).abs().max() < 1e-10
    assert matrix.abs().sum(dim=0).max() < 3


def test_half_precision_stays_so():
    model = tiny_sit(**LATENT).to(torch.bfloat16)
    exported = to_diffusers_dit(model)
    assert exported.dtype == torch.bfloat16
    x, labels = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
    with torch.no_grad():
        velocity = -model(x.bfloat16(), 1 - torch.arange(16) / 16, labels).sample
        found = exported(x.bfloat16(), 1000 * torch.arange(16) / 16, labels).sample
    assert (found - velocity).abs().max() < 0.05 * velocity.abs().max()


def test_what_diffusers_cannot_be_is_refused():
    for config, reason in (({"class_dropout_prob": 0.0}, "null class"), ({"mlp_ratio": 2.0}, "mlp_ratio=2.0")):
        with pytest.raises(ValueError, match=reason):
            to_diffusers_dit(tiny_sit(**config))
    model = tiny_sit()
    model.pos_embed.data[0, 1, 2] += 0.01
    with pytest.raises(ValueError, match="position embeddings"):
        to_diffusers_dit(model)


def test_an_exported_pipeline_is_not_taken_for_one_of_predicted_noise():
    exported = to_diffusers_pipeline(SiTPipeline(tiny_sit(**LATENT), tiny_vae()))
    with pytest.raises(ValueError, match=r"FlowMapEulerDiscreteScheduler is not of .*train the SiTPipeline"):
        as_policy(exported)
