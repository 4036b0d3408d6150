# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from tests.edm2 import TINY, fill_with_pattern, pattern, tiny_edm2, tiny_edm2_pipeline
from tests.helpers import tiny_trainer, tiny_vae
from trl_distreward import DiffusionPolicy, EDM2Pipeline, EDM2UNet2DModel, load_pipeline
from trl_distreward.generation import SamplingSchedule, sample
from trl_distreward.policies import as_policy
from trl_distreward.sampling import karras_grid, transition

# every 48th number of the original sampler's output: 6 steps, guidance 1.5, patterned networks, the guider's phase 0.5
ORIGINAL = [
    *(1.0155292, -1.3014808, -0.0565675, 2.344902, 0.5746335, -0.5720402),
    *(-1.4935496, 1.9176, 1.9907261, 0.224901, -1.1213069, 6.0985775),
]
EDM = SamplingSchedule(8, "ode", solver="heun_sigma", time_grid="karras")


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]


def test_sampler_matches_the_original_code():
    model = fill_with_pattern(EDM2UNet2DModel(**TINY).eval())
    guider = fill_with_pattern(EDM2UNet2DModel(**{**TINY, "num_classes": 0}).eval(), 0.5)
    pipeline = EDM2Pipeline(model, guider)
    pipeline.set_progress_bar_config(disable=True)
    latents = pattern((3, 3, 8, 8), 2.0)
    sampled = pipeline([0, 3, 4], 1.5, 6, latents=latents, output_type="latent").images
    assert sampled.flatten()[::48].tolist() == pytest.approx(ORIGINAL, abs=2e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_policy_and_pipeline_sample_alike(guidance_scale):
    pipeline, labels = tiny_edm2_pipeline(), torch.tensor([0, 3, 4])
    policy = as_policy(pipeline, guidance_scale)
    assert isinstance(policy, DiffusionPolicy)
    expected = pipeline(labels, guidance_scale, 8, generator=generators(), output_type="latent").images
    actual = sample(policy, policy.model, labels, EDM, generators()).sample
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    # Heun's steps on the straight path differ
    other = SamplingSchedule(8, "ode", solver="heun", time_grid="karras")
    assert (sample(policy, policy.model, labels, other, generators()).sample - expected).abs().max() > 1e-2


def test_at_pure_noise_the_network_gets_its_highest_noise_level():
    pipeline = tiny_edm2_pipeline()
    policy, labels, noise = as_policy(pipeline), torch.tensor([0, 3]), torch.randn(2, 3, 8, 8)
    v = policy.velocity(policy.model, noise, torch.ones(2), policy.encode(labels))
    torch.testing.assert_close(v, noise - pipeline.unet(80 * noise, 80.0, labels).sample)


@pytest.mark.parametrize("time_grid", ["uniform", "karras"])
@torch.no_grad()
def test_stochastic_rollout_replays_exactly(time_grid):
    policy, labels = as_policy(tiny_edm2_pipeline(), 1.5), torch.tensor([0, 3, 4])
    schedule = SamplingSchedule(5, "sde", "sit", 0.8, last_step_size=0, time_grid=time_grid)
    drawn = sample(policy, policy.model, labels, schedule, generators(), keep_steps=range(4))
    for column, i in enumerate(drawn.steps):
        t, t_next = schedule.times[i : i + 2]
        v = policy.velocity(policy.model, drawn.states[i], torch.full((3,), t), policy.encode(labels))
        options = {"noise_schedule": "sit", "noise_level": 0.8, "prev_sample": drawn.states[i + 1]}
        scored = transition(drawn.states[i], v, t, t_next, **options).log_prob
        assert torch.equal((scored - drawn.log_probs[:, column]).exp(), torch.ones(3))


def test_update_changes_trained_parameters_only(tmp_path):
    pipeline = tiny_edm2_pipeline()
    before = {name: value.clone() for part in ("unet", "guider") for name, value in named(pipeline, part)}
    settings = {"max_steps": 1, "guidance_scale": 1.5, "num_eval_images": 3, "activation_checkpointing": True}
    settings |= {"eval_samplers": ["ode"], "num_inference_steps_eval": 8}
    trainer = tiny_trainer(tmp_path, pipeline, lambda images, **_: images.float().mean((1, 2, 3)), **settings)
    evaluated = trainer.args.eval_schedules["ode"]
    assert (evaluated.times, evaluated.solver) == (EDM.times, "heun_sigma")
    assert trainer.args.rollout_schedule.times == karras_grid(4)
    assert not any(p.requires_grad for p in pipeline.guider.parameters())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ratio/min"] == log["ratio/max"] == 1.0 and log["delta_log_prob"] < 1e-6
    moved = {name for part in ("unet", "guider") for name, v in named(pipeline, part) if not v.equal(before[name])}
    assert moved == {f"unet.{name}" for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    trainer.save_model()
    for loaded in (load_pipeline(tmp_path), EDM2Pipeline.from_pretrained(tmp_path)):
        pairs = zip(named(loaded, "unet"), named(pipeline, "unet"), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    weights = trainer.policy.read_weights(tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in pipeline.unet.state_dict().items())


def named(pipeline, part):
    return [(f"{part}.{name}", value) for name, value in getattr(pipeline, part).state_dict().items()]


def test_save_and_load_give_the_same_images(tmp_path):
    latents = {"latents_scale": [0.1] * 4, "latents_bias": [0.3] * 4}
    pipeline = EDM2Pipeline(tiny_edm2(in_channels=4), tiny_edm2(1, in_channels=4), tiny_vae(), **latents)
    pipeline.save_pretrained(tmp_path)
    options = {"guidance_scale": 1.5, "num_inference_steps": 4, "output_type": "pt"}
    expected = pipeline([0, 2], generator=generators()[0], **options).images
    assert expected.shape == (2, 3, 16, 16)
    for loaded in (EDM2Pipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert loaded.config.latents_bias == [0.3] * 4
        assert torch.equal(loaded([0, 2], generator=generators()[0], **options).images, expected)


def test_latents_are_unscaled_before_they_are_decoded():
    pipeline = EDM2Pipeline(tiny_edm2(in_channels=4), vae=tiny_vae())
    raw = torch.randn(2, 4, 4, 4)
    scale = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).view(1, -1, 1, 1)
    mean = torch.tensor([5.81, 3.25, 0.12, -2.15]).view(1, -1, 1, 1)
    images = pipeline.decode((raw - mean) * scale)
    torch.testing.assert_close(images, pipeline.vae.decode(raw).sample.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_pixel_pipeline_gives_every_output_type():
    pipeline = tiny_edm2_pipeline()
    tensor, array, latent = (
        pipeline([1, 2, 3], num_inference_steps=3, generator=generators(), output_type=kind).images
        for kind in ("pt", "np", "latent")
    )
    picture = pipeline([1, 2, 3], num_inference_steps=3, generator=generators(), return_dict=False)[0][0]
    torch.testing.assert_close(tensor, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.asarray(picture), (array[0] * 255).round().astype("uint8"))
    alone = pipeline([2], num_inference_steps=3, generator=[generators()[1]], output_type="latent").images
    torch.testing.assert_close(alone, latent[1:2], atol=1e-3, rtol=1e-3)


def test_network_without_classes_takes_zeros():
    pipeline = EDM2Pipeline(tiny_edm2(num_classes=0))
    assert as_policy(pipeline).num_conditions == 1
    assert pipeline([0, 0], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 8, 8)
    for call, message in (
        (lambda: pipeline([1], num_inference_steps=2), "integers from 0 to 0"),
        (lambda: pipeline([0], guidance_scale=2.0), "no guider"),
        (lambda: as_policy(pipeline, guidance_scale=2.0), "no guider"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": [5]}, "integers from 0 to 4"),
        ({"class_labels": [0], "num_inference_steps": 1}, "num_inference_steps=1"),
        ({"class_labels": [0], "latents": torch.zeros(1, 1, 8, 8)}, r"\(1, 1, 8, 8\)"),
    ],
)
def test_labels_steps_and_latents_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_edm2_pipeline()(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"time_grid": "karras", "time_shift": 2.0}, "time_shift=2.0"),
        ({"time_grid": "karras", "last_step_size": 0.04}, "last_step_size=0.04"),
        ({"sampler": "ode", "solver": "heun_sigma", "time_grid": "uniform"}, "time_grid='karras'"),
        ({"time_grid": "quadratic"}, "time_grid='quadratic'"),
    ],
)
def test_impossible_grids_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingSchedule(4, **kwargs).on(as_policy(tiny_edm2_pipeline()))
