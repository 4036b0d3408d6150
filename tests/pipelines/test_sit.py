# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import torch

from tests.helpers import tiny_pipeline, tiny_sit, tiny_vae
from trl_distreward import SiTPipeline, load_pipeline
from trl_distreward.generation import SamplingSchedule, sample
from trl_distreward.policies import ClassConditionalPolicy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_save_and_load_give_the_same_images(tmp_path):
    pipeline = SiTPipeline(tiny_sit(in_channels=4), vae=tiny_vae())
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SiTPipeline"
    images = [
        p([0, 2], num_inference_steps=4, generator=generator(), output_type="pt").images
        for p in (pipeline, SiTPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path))
    ]
    assert images[0].shape == (2, 3, 8, 8)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_pixel_pipeline_gives_every_output_type():
    def call(**kwargs):
        return tiny_pipeline()([1, 2], num_inference_steps=3, generator=generator(), return_dict=False, **kwargs)[0]

    tensor, array, picture = call(output_type="pt"), call(output_type="np"), call()[0]
    assert tensor.shape == (2, 1, 4, 4) and array.shape == (2, 4, 4, 1)
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.asarray(picture), (array[0, ..., 0] * 255).round().astype("uint8"))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_policy_and_pipeline_sample_alike(guidance_scale, solver, sampler):
    pipeline, labels = tiny_pipeline(), torch.tensor([0, 1, 2])
    policy = ClassConditionalPolicy(pipeline, guidance_scale)
    last = 0.04 if sampler == "sde" else None
    schedule = SamplingSchedule(6, sampler, "sit", 0.8, solver=solver, last_step_size=last)
    options = {"num_inference_steps": 6, "sampler": sampler, "solver": solver, "noise_level": 0.8}
    expected = pipeline(labels, guidance_scale, generator=generator(), output_type="latent", **options).images
    actual = sample(policy, policy.model, labels, schedule, generator()).sample
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_guidance_extrapolates_from_the_null_class():
    pipeline = tiny_pipeline()
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 1])
    null = torch.tensor([3, 3])
    model = pipeline.transformer.eval()
    conditional = pipeline.predict_velocity(model, x, t, labels)
    unconditional = -model(x, 1 - t, null).sample
    guided = pipeline.predict_velocity(model, x, t, labels, guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": [3]}, "integers from 0 to 2"),
        ({"class_labels": [-1, 0]}, r"class_labels=\[-1, 0\] must be"),
        ({"class_labels": [0], "sampler": "ddim"}, "sampler='ddim'"),
        ({"class_labels": [0], "latents": torch.zeros(1, 1, 8, 8)}, r"\(1, 1, 8, 8\)"),
        ({"class_labels": [0], "num_inference_steps": 0}, "num_inference_steps=0"),
    ],
)
def test_labels_steps_and_latents_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**kwargs)


@pytest.mark.parametrize("use", [lambda p: p([0], guidance_scale=2.0), lambda p: ClassConditionalPolicy(p, 2.0)])
def test_guidance_without_a_null_class_is_refused(use):
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        use(tiny_pipeline(class_dropout_prob=0.0))
