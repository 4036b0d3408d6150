# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Arguments that pipelines of diffusers share."""

import doctest

import pytest
import torch

from tests.edm2 import tiny_edm2_pipeline
from tests.helpers import tiny_pipeline

OPTIONS = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(params=[lambda: tiny_pipeline(sample_size=8, in_channels=3), tiny_edm2_pipeline], ids=["sit", "edm2"])
def pipeline(request):
    return request.param()


def test_samples_are_in_float32_and_one_label_can_have_several_images(pipeline):
    latents = torch.randn(4, 3, 8, 8).bfloat16()
    expected = pipeline([0, 0, 2, 2], latents=latents.float(), **OPTIONS).images
    assert torch.equal(pipeline([0, 2], num_images_per_prompt=2, latents=latents, **OPTIONS).images, expected)
    torch.testing.assert_close(pipeline(2, latents=latents[2:3], **OPTIONS).images, expected[2:3], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        pipeline([0, 2], num_images_per_prompt=2, generator=[torch.Generator()] * 3, **OPTIONS)


def test_a_callback_reads_and_replaces_samples_and_stops_the_run(pipeline):
    seen = []

    def callback(pipeline, step, t, tensors):
        seen.append(step)
        pipeline._interrupt = step == 1
        return {"latents": tensors["latents"].fill_(step)}

    images = pipeline([0, 2], callback_on_step_end=callback, **OPTIONS).images
    assert seen == [0, 1] and torch.equal(images, torch.ones(2, 3, 8, 8)) and pipeline.num_timesteps == 4
    assert not torch.equal(pipeline([0, 2], **OPTIONS).images, images)


def test_the_example_runs(pipeline):
    example = doctest.DocTestFinder(recurse=False).find(type(pipeline).__call__, "example", globs={})
    assert doctest.DocTestRunner().run(example[0]) == (0, 2 + 1)


def test_another_pipeline_shares_all_networks(pipeline):
    other = type(pipeline).from_pipe(pipeline)
    assert other is not pipeline and all(other.components[name] is part for name, part in pipeline.components.items())
