# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Our pipelines under the mixins that test diffusers' own pipelines."""

import pytest

from tests.edm2 import tiny_edm2
from tests.helpers import tiny_sit, tiny_vae
from tests.peers import diffusers_tests
from trl_distreward import EDM2Pipeline, SiTPipeline

pytestmark = pytest.mark.slow

mixins = diffusers_tests("pipelines.testing_utils")
params = diffusers_tests("pipelines.pipeline_params")


class ClassConfig(mixins.BasePipelineTesterConfig):
    required_input_params_in_call_signature = params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS

    def get_dummy_inputs(self):
        return {"class_labels": [1], "num_inference_steps": 3, "output_type": "pt", "generator": self.get_generator()}


class SiTConfig(ClassConfig):
    pipeline_class = SiTPipeline
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        return {"transformer": tiny_sit(sample_size=8, in_channels=4), "vae": tiny_vae()}


class EDM2Config(ClassConfig):
    pipeline_class = EDM2Pipeline
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        guider = tiny_edm2(1, in_channels=4, num_classes=0)
        return {"unet": tiny_edm2(in_channels=4), "guider": guider, "vae": tiny_vae()}


class TestSiT(SiTConfig, mixins.PipelineTesterMixin):
    pass


class TestSiTMemory(SiTConfig, mixins.MemoryTesterMixin):
    pass


class TestEDM2(EDM2Config, mixins.PipelineTesterMixin):
    pass


class TestEDM2Memory(EDM2Config, mixins.MemoryTesterMixin):
    pass
