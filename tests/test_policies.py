# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import torch

from tests.helpers import tiny_pipeline
from trl_distreward import DiffusionPolicy
from trl_distreward.generation import SamplingSchedule, generate_images, image_generators
from trl_distreward.policies import ClassConditionalPolicy, as_policy, to_uint8


def test_an_image_depends_on_seed_and_index_alone():
    policy, labels = ClassConditionalPolicy(tiny_pipeline()), torch.arange(9) % 3
    for schedule in (SamplingSchedule(4, "sde"), SamplingSchedule(4, "ode")):
        sizes = [
            torch.cat([images for images, _ in generate_images(policy, labels, schedule, batch_size=size)])
            for size in (9, 4, 1)
        ]
        for images in sizes[1:]:
            assert (images.int() - sizes[0].int()).abs().max() <= 1  # kernels may differ in the last bit
    other = torch.cat([images for images, _ in generate_images(policy, labels, schedule, seed=1)])
    assert not torch.equal(other, sizes[0])


def test_streams_of_noise_do_not_meet():
    seeds = {
        generator.initial_seed()
        for stream, step in (("rollout", 0), ("rollout", 1), ("reference", 0), ("evaluation", 0))
        for generator in image_generators(0, stream, step, range(6400))
    }
    assert len(seeds) == 4 * 6400


def test_protocol_is_met_and_passes_through():
    policy = as_policy(tiny_pipeline(), guidance_scale=1.5)
    assert isinstance(policy, DiffusionPolicy) and policy.guidance_scale == 1.5
    assert as_policy(policy) is policy


def test_quantization_rounds_as_image_files_do():
    images = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1, 0.00197, 0.00195])
    assert to_uint8(images).tolist() == [0, 128, 255, 255, 0, 1, 0]
