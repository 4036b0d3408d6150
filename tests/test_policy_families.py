# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Every family of pipelines: parity with the pipeline itself, replay, one update, and a pipeline that loads."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.helpers import tiny_config
from tests.policies_tiny import FAMILIES, MORE_SAMPLERS, TEXT_FAMILIES
from tests.runs import weights
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, SubsetReplaceReward
from trl_distreward.generation import SamplingSchedule, sample
from trl_distreward.policies import as_policy
from trl_distreward.sampling import transition

ODE = SamplingSchedule(4, "ode")
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def build(family):
    torch.manual_seed(0)
    pipeline = family.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def called(family, pipeline, guidance_scale=1.0):
    noise = generators(len(family.conditions))
    return family.call(pipeline, list(family.conditions), guidance_scale, generator=noise, num_inference_steps=4)


@torch.no_grad()
def generated(policy, conditions, schedule=ODE):
    return policy.decode(sample(policy, policy.model, conditions, schedule, generators(len(conditions))).sample)


@pytest.mark.parametrize("family", FAMILIES + MORE_SAMPLERS, ids=lambda family: family.name)
def test_the_ode_equals_the_pipelines_deterministic_sampler(family):
    pipeline, images = build(family), {}
    for scale in family.guidance_scales:
        images[scale] = generated(as_policy(pipeline, scale, **family.options), family.conditions)
        torch.testing.assert_close(images[scale], called(family, pipeline, scale), rtol=0, atol=1e-4)
    policy = as_policy(pipeline, **family.options)
    if len(set(family.conditions)) > 1:  # parity does not show that conditions have an effect
        others = [family.conditions[-1], *family.conditions[:-1]]
        assert (generated(policy, others) - images[1.0]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    if len(images) > 1:
        assert (images[3.0] - images[1.0]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_a_prompts_embedding_does_not_depend_on_its_batch(family):
    policy, other = (as_policy(build(family), **family.options) for _ in range(2))
    policy.embedded(["two dogs that run over a long and green meadow", "a cat", "a bird"])
    other.embedded(["a cat"])
    known, alone = policy._embedding("a cat"), other._embedding("a cat")
    assert known.keys() == alone.keys()
    assert all(torch.equal(known[name], alone[name]) for name in alone)


@every_family
def test_a_stochastic_rollout_replays(family):
    pipeline, noise = build(family), {"noise_schedule": "sit", "noise_level": 0.7}
    for scale in family.guidance_scales:
        policy = as_policy(pipeline, scale, **family.options)
        schedule = SamplingSchedule(3, last_step_size=0, **noise).on(policy)
        steps, count = schedule.trainable_steps, len(family.conditions)
        rollout = sample(policy, policy.model, family.conditions, schedule, generators(count), keep_steps=steps)
        cond, times = policy.encode(family.conditions), schedule.times

        def log_prob(step, rows, policy=policy, states=rollout.states, times=times, cond=cond):
            x, part = states[step][rows], {name: value[rows] for name, value in cond.items()}
            v = policy.velocity(policy.model, x, torch.full((len(x),), times[step]), part)
            taken = states[step + 1][rows]
            return transition(x, v, times[step], times[step + 1], prev_sample=taken, **noise).log_prob

        for place, step in enumerate(steps):
            drawn = rollout.log_probs[:, place]
            replayed = log_prob(step, torch.arange(count))
            assert replayed.requires_grad
            assert torch.equal((replayed - drawn).exp(), torch.ones(count))
            alone = torch.cat([log_prob(step, torch.tensor([i])) for i in range(count)])
            # convolutions round differently in batches of another size, and on another processor
            torch.testing.assert_close(alone, drawn, rtol=0, atol=1e-4)


def projection(images):
    """Six fixed random features of images of any size."""
    pixels = images.float().flatten(1) / 127.5 - 1
    return pixels @ torch.randn(pixels.shape[1], 6, generator=torch.Generator().manual_seed(5))


QUICK = [("dit", False), ("ddim", False), ("sd1", True), ("sd3", False), ("qwen-image", True)]
UPDATES = [
    pytest.param(
        family,
        lora,
        id=f"{family.name}-{'lora' if lora else 'full'}",
        marks=[] if (family.name, lora) in QUICK else pytest.mark.slow,
    )
    for family in FAMILIES
    for lora in (False, True)
]


@pytest.mark.parametrize(("family", "lora"), UPDATES)
def test_one_update_moves_what_is_trained_and_saves_a_pipeline(family, lora, tmp_path):
    pipeline, scale = build(family), family.guidance_scales[-1]
    policy = as_policy(pipeline, scale, **family.options)
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in components.items()}
    shape = generated(policy, family.conditions).shape
    real = projection(torch.randint(0, 256, (30, *shape[1:])).to(torch.uint8))
    sizes = {"max_steps": 1, "reference_set_size": 8, "num_subsets": 4, "replace_size": 1, "num_inference_steps": 2}
    sizes |= {"loss_type": "transport", "sampler": "auto"} if lora else {}  # the default, with half of the models
    column = "class_labels" if policy.num_conditions else "prompt"
    trainer = DistributionRewardTrainer(
        model=policy,
        reward_funcs=SubsetReplaceReward(projection, FeatureStatistics.from_features(real)),
        args=tiny_config(tmp_path, **sizes, num_inference_steps_eval=4, learning_rate=1e-2),
        train_dataset=Dataset.from_dict({column: list(family.conditions)}),
        peft_config=LoraConfig(r=2, lora_alpha=3, init_lora_weights=False) if lora else None,
    )
    initial = weights(trainer.network)
    trainer.train()
    logs = trainer.state.log_history[0]
    if lora:
        assert [reward.of_sets for reward in trainer.estimator.moving] == [True]  # through every model's decoder
        assert trainer.batch.displacement.any()
    else:
        assert logs["ratio/min"] == logs["ratio/max"] == 1.0
        assert logs["delta_log_prob"] < 1e-4

    for name, part in components.items():
        if name != policy.component:
            assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items()), name
    moved = {name for name, value in trainer.network.named_parameters() if not torch.equal(value, initial[name])}
    trainable = {name for name, value in trainer.network.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trainable) == lora
    assert moved <= trainable and len(moved) > 0.7 * len(trainable)

    trained = generated(policy, family.conditions)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(pipeline).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "default_sample_size"):
        loaded.default_sample_size = pipeline.default_sample_size
    torch.testing.assert_close(called(family, loaded, scale), trained, rtol=0, atol=1e-4)
    other = build(family)
    assert (trained - called(family, other, scale)).abs().max() > 1e-2
    if lora and hasattr(pipeline, "load_lora_weights"):
        file = {"subfolder": "adapter", "weight_name": "pytorch_lora_weights.safetensors"}
        other.load_lora_weights(str(tmp_path / "saved"), **file)
        torch.testing.assert_close(called(family, other, scale), trained, rtol=0, atol=1e-4)
