# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib.util
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, PNDMScheduler, UNet2DModel

from tests.edm2 import tiny_edm2_pipeline
from tests.helpers import tiny_pipeline
from tests.policies_parts import ddim
from tests.policies_tiny import dit, stable_diffusion
from trl_distreward import DiffusionPolicy
from trl_distreward.conditions import conditions_of_slots
from trl_distreward.generation import SamplingSchedule, generate_images, image_generators, sample
from trl_distreward.policies import ClassConditionalPolicy, DiscreteTimePolicy, as_policy, to_uint8
from trl_distreward.sampling import time_grid

ONE_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def seeded(build, *args):
    torch.manual_seed(0)
    return build(*args)


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


@pytest.mark.parametrize("broken", ["velocity", "decode"])
def test_images_that_are_not_finite_are_not_black_images(monkeypatch, broken):
    policy = ClassConditionalPolicy(tiny_pipeline())
    whole = getattr(policy, broken)

    def diverged(*args):
        values = whole(*args)
        if broken == "velocity" and len(values) > 2:
            values[2] = torch.nan
        elif broken == "decode" and len(values) == 1:  # the last batch's: image 8
            values = values * torch.nan
        return values

    monkeypatch.setattr(policy, broken, diverged)
    images = generate_images(policy, torch.arange(9) % 3, SamplingSchedule(2, "ode"), batch_size=4)
    with pytest.raises(ValueError, match=f"image {2 if broken == 'velocity' else 8} is not finite: the model has"):
        list(images)


def test_images_are_those_of_the_network_without_dropout():
    policy = ClassConditionalPolicy(tiny_pipeline(class_dropout_prob=0.5))
    labels, schedule = torch.arange(9) % 3, SamplingSchedule(2, "ode")
    (expected,) = (images for images, _ in generate_images(policy, labels, schedule))
    policy.model.train()
    frozen = next(policy.model.children()).eval()
    (images,) = (images for images, _ in generate_images(policy, labels, schedule))
    assert torch.equal(images, expected) and policy.model.training and not frozen.training


def test_labels_that_the_model_does_not_know_make_no_images():
    policy = ClassConditionalPolicy(tiny_pipeline())
    with pytest.raises(ValueError, match="labels must lie in 0 to 2"):
        list(generate_images(policy, [0, 3], SamplingSchedule(2, "ode")))


def test_dopri5_is_refused_where_the_model_has_no_velocity_at_data():
    schedule = SamplingSchedule(2, "ode", solver="dopri5")
    for pipeline in (stable_diffusion(ddim()), tiny_edm2_pipeline()):
        with pytest.raises(ValueError, match=r"solver='dopri5' needs the velocity at t = 0, where .*Policy has none"):
            schedule.on(as_policy(pipeline))
    assert schedule.on(as_policy(tiny_pipeline())) is schedule


def test_only_euler_keeps_states():
    policy, schedule = ClassConditionalPolicy(tiny_pipeline()), SamplingSchedule(2, "ode", solver="heun")
    with pytest.raises(ValueError, match="solver='heun' keeps no states"):
        sample(policy, policy.model, [0], schedule, keep_states=[1])


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


# ---- discrete steps ----


class PointData(DiscreteTimePolicy):
    """The exact network of data in one point, `μ = 0.3`, whatever its prediction type."""

    component = "unet"

    def network(self, model, z, timestep, inputs):
        step = timestep.double().numpy()
        sigma = torch.from_numpy(np.interp(step, np.arange(len(self.sigmas)), self.sigmas.numpy())).view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        noise = (z.double() - alpha * 0.3) / (sigma * alpha)
        outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * alpha * 0.3, "sample": 0.3 + 0 * noise}
        return torch.cat([outputs[self.prediction_type], noise], dim=1).float()  # the second half is a variance

    def inputs(self, cond, guided):
        return {}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_every_prediction_type_is_the_same_velocity(prediction_type, beta_schedule):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type, clip_sample=False)
    policy = PointData(DDIMPipeline(UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK), scheduler))
    first = (policy.sigmas[0] / (1 + policy.sigmas[0])).item()
    t = torch.cat([torch.linspace(first, 0.98, 7), torch.rand(20) * 0.9 + 0.05, torch.tensor([1.0])])
    x = torch.randn(len(t), 3, 4, 4)
    velocity = policy.velocity(policy.model, x, t, {})
    torch.testing.assert_close(velocity, (x - 0.3) / t.view(-1, 1, 1, 1), rtol=2e-3, atol=2e-3)


def test_clipped_data_is_where_the_velocity_leads():
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.2)
    policy = PointData(DDIMPipeline(UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK), scheduler))
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 0.8])
    data = x - t.view(-1, 1, 1, 1) * policy.velocity(policy.model, x, t, {})
    torch.testing.assert_close(data, torch.full_like(data, 0.2))


def test_schedulers_made_from_others_use_what_is_theirs_alone():
    unet = UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK)
    pipeline = DDPMPipeline(unet, DDIMScheduler(clip_sample=True))
    assert as_policy(pipeline).clip == 1.0
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.clip_sample and as_policy(pipeline).clip is None
    thresholded = DDIMScheduler(thresholding=True, prediction_type="v_prediction")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(thresholded.config)
    assert as_policy(pipeline).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
    ],
)
def test_every_scheduler_has_a_grid(name, settings):
    pipeline = DDIMPipeline(UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK), DDIMScheduler())
    pipeline.scheduler = getattr(diffusers, name)(**settings)
    schedule = SamplingSchedule(20, "ode", time_grid="auto").on(as_policy(pipeline))
    assert len(schedule.times) == 21 and schedule.times[-1] == 0
    assert all(a > b for a, b in pairwise(schedule.times))
    assert 0.9 < schedule.times[0] < 1 and 0.9 < schedule.noise_scale < 1.01


def test_a_scheduler_of_another_number_of_steps_is_refused():
    pipeline = DDPMPipeline(UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK), PNDMScheduler())
    with pytest.raises(ValueError, match="the scheduler takes 23 steps for num_inference_steps=20"):
        SamplingSchedule(20, "ode", time_grid="auto").on(as_policy(pipeline))


def test_a_grid_of_the_scheduler_takes_no_other_settings():
    for settings in ({"time_shift": 2.0}, {"last_step_size": 0.04}):
        with pytest.raises(ValueError, match="time_grid='auto' fixes all steps"):
            SamplingSchedule(4, time_grid="auto", **settings)
    assert SamplingSchedule(4, time_grid="auto").on(ClassConditionalPolicy(tiny_pipeline())).times == time_grid(4)


def test_what_is_no_velocity_is_refused():
    unet = UNet2DModel(4, block_out_channels=(32,), **ONE_BLOCK)
    with pytest.raises(ValueError, match="thresholding"):
        as_policy(DDIMPipeline(unet, DDIMScheduler(thresholding=True)))
    with pytest.raises(ValueError, match="needs a null class"):
        as_policy(DDIMPipeline(unet, DDIMScheduler()), guidance_scale=2.0)
    distilled = stable_diffusion(ddim())
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="guidance as an embedding .time_cond_proj_dim=8"):
        as_policy(distilled)
    with pytest.raises(ValueError, match="'a cat' is one prompt: pass a list"):
        as_policy(stable_diffusion(ddim())).check_conditions("a cat")


def test_the_null_class_is_of_the_networks_config():
    pipeline = dit(num_classes=5)
    policy = as_policy(pipeline, guidance_scale=2.0)
    labels = policy.inputs(policy.encode([0, 4]), guided=True)["class_labels"]
    assert labels.tolist() == [5, 5, 0, 4] and policy.num_conditions == 5
    with pytest.raises(ValueError, match="labels must lie in 0 to 4"):
        policy.check_conditions([5])


# ---- prompts ----


def counting(encoder):
    """Counts the prompts that a text encoder sees."""
    seen = []
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return seen


def test_prompts_are_encoded_once_and_forgotten_beyond_the_cache():
    policy = as_policy(stable_diffusion(ddim()), cache_size=2)
    seen = counting(policy.pipeline.text_encoder)
    for _ in range(3):
        policy.inputs(policy.encode(["a cat", "the dog", "a cat"]), guided=False)
    assert sum(seen) == 2
    embeds = policy.inputs(policy.encode(["a red dog", "a cat", "the dog"]), guided=False)["prompt_embeds"]
    assert sum(seen) == 3 and len(embeds) == 3
    policy.inputs(policy.encode(["a cat", "the dog"]), guided=False)  # the last two asked for
    assert sum(seen) == 3
    policy.inputs(policy.encode(["a red dog"]), guided=False)
    assert sum(seen) == 4


def test_encoded_prompts_are_their_texts():
    policy = as_policy(stable_diffusion(ddim()))
    prompts = ["", "a cat", "Katze, 猫, 🐈 "]
    cond = policy.encode(prompts)["prompt"]
    assert [bytes(row.tolist()).rstrip(b"\0").decode() for row in cond] == prompts
    for bad in (["x" * 5000], ["a\0b"], [3]):
        with pytest.raises(ValueError, match="prompt"):
            policy.encode(bad)


def test_offloaded_text_encoders_give_the_same_embeddings():
    kept, offloaded = (
        as_policy(seeded(stable_diffusion, ddim()), guidance_scale=2.0, offload_text_encoders=offload)
        for offload in (False, True)
    )
    offloaded.to(torch.device("meta"))  # where an encoder would lose its weights
    for name, value in kept.inputs(kept.encode(["a cat"]), guided=True).items():
        assert torch.equal(value, offloaded.inputs(offloaded.encode(["a cat"]), guided=True)[name])


def test_sizes_are_checked():
    policy = as_policy(stable_diffusion(ddim()), height=12, width=16)
    assert policy.sample_shape == (4, 6, 8)
    with pytest.raises(ValueError, match="must be multiples of 2"):
        as_policy(stable_diffusion(ddim()), height=13)


def test_prompts_of_another_batch_are_read_anew():
    policy = as_policy(stable_diffusion(ddim()))
    one, other = policy.encode(["a", "b c"]), policy.encode(["d"])
    assert policy.prompts(one["prompt"]) == ["a", "b c"] and policy.prompts(other["prompt"]) == ["d"]
    assert policy.prompts(one["prompt"][1:]) == ["b c"]


def test_slots_keep_their_prompts():
    policy = as_policy(stable_diffusion(ddim()))
    prompts = [f"cat {i}" for i in range(5)]
    dataset = Dataset.from_dict({"prompt": prompts, "other": range(5)})
    slots = conditions_of_slots(policy, dataset, 12, seed=0)
    assert sorted(slots[:5]) == sorted(slots[5:10]) == prompts and len(slots) == 12
    assert slots == conditions_of_slots(policy, dataset, 12, seed=0) != conditions_of_slots(policy, dataset, 12, 1)
    with pytest.raises(ValueError, match="column 'prompt'"):
        conditions_of_slots(policy, Dataset.from_dict({"text": prompts}), 12, seed=0)
    with pytest.raises(ValueError, match="a train_dataset with a column 'prompt'"):
        conditions_of_slots(policy, None, 12, seed=0)


# ---- a user's own ----


def test_the_example_of_a_custom_policy_trains_and_saves(tmp_path):
    path = Path(__file__).parents[1] / "examples" / "custom_policy.py"
    spec = importlib.util.spec_from_file_location("custom_policy", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = ["--pretraining-steps", "30", "--steps", "2", "--reference-set-size", "100"]
    report = example.main([*settings, "--output-dir", str(tmp_path)])
    assert all(0 < value < 100 for value in report.values()) and len(set(report.values())) == 2
    policy = example.DigitsPolicy(example.VelocityMLP())
    assert isinstance(policy, DiffusionPolicy)
    policy.model.load_state_dict(policy.read_weights(tmp_path))
