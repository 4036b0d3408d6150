# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib.util
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from tests.edm2 import tiny_edm2_pipeline
from tests.helpers import tiny_pipeline
from tests.policies_parts import ddim
from tests.policies_tiny import FAMILIES, dit, flux, stable_diffusion
from trl_distreward import DiffusionPolicy
from trl_distreward.conditions import conditions_of_slots
from trl_distreward.generation import SamplingSchedule, generate_images, image_generators, sample
from trl_distreward.policies import ClassConditionalPolicy, DiscreteTimePolicy, as_policy
from trl_distreward.sampling import time_grid, transition


def pixels(scheduler):
    """A pipeline of images, whose network plays no part in these tests."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return DDIMPipeline(UNet2DModel(4, block_out_channels=(32,), **blocks), scheduler)


def test_an_image_depends_on_seed_and_index_alone():
    policy, labels = ClassConditionalPolicy(tiny_pipeline()), torch.arange(9) % 3
    for schedule in (SamplingSchedule(4, "sde"), SamplingSchedule(4, "ode")):
        whole, parts, single, other = (
            torch.cat([images for images, _ in generate_images(policy, labels, schedule, batch_size=size, seed=seed)])
            for size, seed in ((9, 0), (4, 0), (1, 0), (9, 1))
        )
        for images in (parts, single):
            assert (images.int() - whole.int()).abs().max() <= 1  # kernels may differ in the last bit
        assert not torch.equal(other, whole)


@pytest.mark.parametrize(("part", "size", "image"), [("velocity", 4, 2), ("decode", 1, 8)])
def test_images_that_are_not_finite_are_not_black_images(monkeypatch, part, size, image):
    policy = ClassConditionalPolicy(tiny_pipeline())
    whole = getattr(policy, part)

    def diverged(*args):
        values = whole(*args).clone()
        if len(values) == size:  # the last batch has one image
            values[image % 4] = torch.nan
        return values

    monkeypatch.setattr(policy, part, diverged)
    images = generate_images(policy, torch.arange(9) % 3, SamplingSchedule(2, "ode"), batch_size=4)
    with pytest.raises(ValueError, match=f"image {image} is not finite: the model has"):
        list(images)


def test_images_are_generated_without_dropout():
    policy = ClassConditionalPolicy(tiny_pipeline(class_dropout_prob=0.5))
    labels, schedule = torch.arange(9) % 3, SamplingSchedule(2, "ode")
    (expected,) = (images for images, _ in generate_images(policy, labels, schedule))
    policy.model.train()
    frozen = next(policy.model.children()).eval()
    (images,) = (images for images, _ in generate_images(policy, labels, schedule))
    assert torch.equal(images, expected) and policy.model.training and not frozen.training


def test_dopri5_is_refused_for_models_without_a_velocity_at_data():
    schedule = SamplingSchedule(2, "ode", solver="dopri5")
    for pipeline in (stable_diffusion(ddim()), tiny_edm2_pipeline()):
        with pytest.raises(ValueError, match=r"solver='dopri5' needs the velocity at t = 0, where .*Policy has none"):
            schedule.on(as_policy(pipeline))
    assert schedule.on(as_policy(tiny_pipeline())).solver == "dopri5"


class PointData(DiscreteTimePolicy):
    """The exact network of data in one point, `μ = 0.3`, for every prediction type."""

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
    policy = PointData(pixels(scheduler))
    first = (policy.sigmas[0] / (1 + policy.sigmas[0])).item()
    t = torch.cat([torch.linspace(first, 0.98, 7), torch.rand(20) * 0.9 + 0.05, torch.tensor([1.0])])
    x = torch.randn(len(t), 3, 4, 4)
    velocity = policy.velocity(policy.model, x, t, {})
    torch.testing.assert_close(velocity, (x - 0.3) / t.view(-1, 1, 1, 1), rtol=2e-3, atol=2e-3)


def test_the_velocity_leads_to_clipped_data():
    policy = PointData(pixels(DDIMScheduler(clip_sample=True, clip_sample_range=0.2)))
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 0.8])
    data = x - t.view(-1, 1, 1, 1) * policy.velocity(policy.model, x, t, {})
    torch.testing.assert_close(data, torch.full_like(data, 0.2))


def test_a_scheduler_ignores_settings_of_the_one_it_was_made_from():
    pipeline = pixels(DDIMScheduler(clip_sample=True))
    assert as_policy(pipeline).clip == 1.0
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.clip_sample and as_policy(pipeline).clip is None
    thresholded = DDIMScheduler(thresholding=True, prediction_type="v_prediction")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(thresholded.config)
    assert as_policy(pipeline).prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["DDPM", "PNDM", "HeunDiscrete", "DPMSolverMultistep", "KDPM2Discrete"])
def test_every_scheduler_has_a_grid(name):
    pipeline = pixels(DDIMScheduler())
    settings = {"skip_prk_steps": True} if name == "PNDM" else {}
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    schedule = SamplingSchedule(20, "ode").on(as_policy(pipeline))
    assert len(schedule.times) == 21 and schedule.times[-1] == 0
    assert all(a > b for a, b in pairwise(schedule.times))
    assert 0.9 < schedule.times[0] < 1 and 0.9 < schedule.noise_scale < 1.01
    pipeline.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(ValueError, match="the scheduler takes 23 steps for num_inference_steps=20"):
        SamplingSchedule(20, "ode").on(as_policy(pipeline))


def test_a_grid_of_the_scheduler_takes_no_other_settings():
    pipeline = pixels(DDIMScheduler())
    for settings in ({"time_shift": 2.0}, {"last_step_size": 0.04}):
        with pytest.raises(ValueError, match="time_grid='auto' fixes all steps"):
            SamplingSchedule(4, **settings).on(as_policy(pipeline))
        even = SamplingSchedule(4, time_grid="uniform", **settings)
        assert even.on(as_policy(pipeline)).times == even.times
    with pytest.raises(ValueError, match="solver='heun_sigma' cannot start from t = 1"):
        SamplingSchedule(4, "ode", solver="heun_sigma").on(as_policy(flux(False), height=8, width=8))


def test_sit_is_sampled_in_even_steps():
    policy = ClassConditionalPolicy(tiny_pipeline())
    assert SamplingSchedule(4, "ode").on(policy).times == time_grid(4)
    schedule = SamplingSchedule(4).on(policy)
    assert schedule.times == SamplingSchedule(4).times == time_grid(4, last_step_size=0.04)
    shifted = SamplingSchedule(4, time_shift=3.0, last_step_size=0.1)
    assert shifted.on(policy).times == time_grid(4, shift=3.0, last_step_size=0.1)
    assert SamplingSchedule(4, last_step_size=0).on(policy).times == time_grid(4)


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: pixels(DDIMScheduler()), tiny_edm2_pipeline, tiny_pipeline])
def test_the_last_sde_step_has_noise_only_if_asked(build):
    policy = as_policy(build())
    for last_step_size, steps in (("auto", (0, 1, 2)), (0, (0, 1, 2, 3)), (None, (0, 1, 2, 3))):
        schedule = SamplingSchedule(4, last_step_size=last_step_size).on(policy)
        assert schedule.trainable_steps == steps
        generators, labels = image_generators(0, "last step", 0, [0, 1]), torch.tensor([0, 0])
        drawn = sample(policy, policy.model, labels, schedule, generators, keep_states=[3])
        x, t = drawn.states[3], schedule.times[3]
        v = policy.velocity(policy.model, x, torch.full((2,), t), policy.encode(labels))
        mean = transition(x, v, t, 0.0, noise_schedule="sit", noise_level=1.0).mean
        assert torch.equal(drawn.sample, mean) == (last_step_size == "auto")


def test_pipelines_without_the_asked_velocity_are_refused():
    distilled = stable_diffusion(ddim())
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    for pipeline, options, message in (
        (pixels(DDIMScheduler(thresholding=True)), {}, "thresholding"),
        (pixels(DDIMScheduler()), {"guidance_scale": 2.0}, "needs a null class"),
        (distilled, {}, "time_cond_proj_dim=8"),
        (stable_diffusion(ddim()), {"height": 13}, "must be multiples of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            as_policy(pipeline, **options)
    with pytest.raises(ValueError, match="'a cat' is one prompt"):
        as_policy(stable_diffusion(ddim())).check_conditions("a cat")


@pytest.mark.parametrize("missing", ["encode", "num_conditions"])
def test_an_own_policy_that_lacks_a_member_is_told_which(missing):
    own = {name: None for name in [*DiffusionPolicy.__annotations__, *vars(DiffusionPolicy)] if name[0] != "_"}
    del own[missing]
    with pytest.raises(TypeError, match=f"Mine lacks {missing}:"):
        as_policy(type("Mine", (), own)())


def wrapped(network):
    """Runs the code that the error about a bare network shows."""
    with pytest.raises(TypeError, match=f"{type(network).__name__} is a network: pass a pipeline with it.\n") as error:
        as_policy(network)
    lines, found = [line.strip() for line in str(error.value).splitlines()[1:]], {"network": network}
    assert len(lines) == 2
    exec("\n".join(lines), found)
    return found["model"]


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_edm2_pipeline, lambda: pixels(DDIMScheduler())])
def test_a_network_without_a_pipeline_is_told_how_to_get_one(build):
    policy = as_policy(build())
    assert as_policy(wrapped(policy.model)).model is policy.model


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name not in ("ddim", "ddpm-classes", "ldm")], ids=lambda family: family.name
)
def test_a_network_of_a_larger_pipeline_names_it(family, monkeypatch):
    """The code is run with a stand-in for the download of the other parts."""
    pipeline = family.build()
    network = as_policy(pipeline, **family.options).model
    network.register_to_config(_name_or_path="org/name")

    def load(cls, name, **parts):
        assert (cls, name) == (type(pipeline), "org/name")
        return cls(**{**pipeline.components, **parts})

    monkeypatch.setattr(type(pipeline), "from_pretrained", classmethod(load))
    assert as_policy(wrapped(network), **family.options).model is network


def test_the_null_class_comes_from_the_networks_config():
    policy = as_policy(dit(num_classes=5), guidance_scale=2.0)
    labels = policy.inputs(policy.encode([0, 4]), guided=True)["class_labels"]
    assert labels.tolist() == [5, 5, 0, 4] and policy.num_conditions == 5
    with pytest.raises(ValueError, match="labels must lie in 0 to 4"):
        policy.check_conditions([5])


def test_prompts_are_encoded_once_and_forgotten_beyond_the_cache():
    policy, seen = as_policy(stable_diffusion(ddim()), cache_size=2), []
    policy.pipeline.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for _ in range(3):
        policy.inputs(policy.encode(["a cat", "the dog", "a cat"]), guided=False)
    assert sum(seen) == 2
    embeds = policy.inputs(policy.encode(["a red dog", "a cat", "the dog"]), guided=False)["prompt_embeds"]
    assert sum(seen) == 4 and len(embeds) == 3  # "a red dog" took the place of "the dog"
    policy.inputs(policy.encode(["a cat", "the dog"]), guided=False)  # the last two asked for
    assert sum(seen) == 4
    policy.inputs(policy.encode(["a red dog"]), guided=False)
    assert sum(seen) == 5


def test_encoded_prompts_are_their_texts():
    policy = as_policy(stable_diffusion(ddim()))
    prompts = ["", "a cat", "Katze, 猫, 🐈 "]
    cond = policy.encode(prompts)["prompt"]
    assert [bytes(row.tolist()).rstrip(b"\0").decode() for row in cond] == prompts
    for bad in (["x" * 5000], ["a\0b"], [3]):
        with pytest.raises(ValueError, match="prompt"):
            policy.encode(bad)


def test_offloaded_text_encoders_give_the_same_embeddings():
    pipeline, copied = stable_diffusion(ddim()), stable_diffusion(ddim())
    copied.text_encoder = pipeline.text_encoder
    kept = as_policy(pipeline, guidance_scale=2.0)
    offloaded = as_policy(copied, guidance_scale=2.0, offload_text_encoders=True)
    offloaded.to(torch.device("meta"))  # an encoder would lose its weights there
    for name, value in kept.inputs(kept.encode(["a cat"]), guided=True).items():
        assert torch.equal(value, offloaded.inputs(offloaded.encode(["a cat"]), guided=True)[name])


def test_sizes_of_images_become_sizes_of_latents():
    assert as_policy(stable_diffusion(ddim()), height=12, width=16).sample_shape == (4, 6, 8)


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
    with pytest.raises(ValueError, match="a train_dataset with a column 'prompt'"):
        conditions_of_slots(policy, None, 12, seed=0)


def test_the_example_of_a_policy_trains_and_saves(tmp_path):
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
