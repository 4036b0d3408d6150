# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from functools import partial

import pytest
import torch
from datasets import Dataset

from tests.clip import coloured, save_tiny_clip, tiny_clip
from tests.helpers import features, real_images, tiny_config, tiny_trainer
from tests.policies_parts import ddim, tokenizer
from tests.policies_tiny import stable_diffusion
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, JointTextFeatures, SubsetReplaceReward
from trl_distreward.metrics import CLIPEmbeddings
from trl_distreward.rewards import (
    PromptScore,
    clip_score,
    hps_score,
    pick_score,
)
from trl_distreward.trainer.reward_functions import RewardFunctions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def cosines(clip, images, prompts):
    return (clip(images) * clip.prompts(prompts)).sum(dim=1)


def test_prompt_scores_are_cosines_as_their_papers_scale_them(folder):
    images, prompts = coloured(9)
    clip = CLIPEmbeddings(tiny_clip(), tokenizer())
    plain = cosines(clip, images, prompts)
    prefixed = cosines(clip, images, [f"A photo depicts {prompt}" for prompt in prompts])
    temperature = tiny_clip().logit_scale.exp().item()
    expected = {clip_score: 2.5 * prefixed.clamp(min=0), pick_score: temperature * plain, hps_score: plain}
    for build, values in expected.items():
        reward = build(folder)
        assert reward.__name__ == build.__name__
        torch.testing.assert_close(reward(images=images, prompts=prompts, slots=None, trainer_state=None), values)
    tokens = tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():  # what PickScore's model card computes, by the model itself
        logits = tiny_clip()(
            pixel_values=clip.prepare(images), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).logits_per_image
    torch.testing.assert_close(pick_score(folder)(images, prompts), logits.diag(), rtol=1e-4, atol=1e-4)


def test_scores_pass_gradients_to_images_and_none_to_weights(folder):
    images, prompts = coloured(4)
    clip = CLIPEmbeddings(tiny_clip(), tokenizer())
    for reward in (pick_score(folder, resize="torch"), PromptScore(clip)):
        tracked = images.float().requires_grad_()
        scores = reward(images=tracked, prompts=prompts)
        (gradient,) = torch.autograd.grad(scores.sum(), tracked)
        assert (gradient != 0).flatten(1).any(dim=1).all()
        assert not any(p.requires_grad for p in reward.parameters())
        torch.testing.assert_close(scores.detach(), reward(images=images, prompts=prompts))
        ahead = tracked.detach() + 40 * gradient / gradient.abs().max()
        assert reward(images=ahead, prompts=prompts).sum() > scores.sum()


def bright(images, **kwargs):
    return images.float().mean(dim=(1, 2, 3)).tolist()


def test_functions_with_the_same_name_get_numbers():
    def named(name):
        def score(images, **kwargs):
            return bright(images)

        score.__name__ = name
        return partial(score, points=1)

    functions = RewardFunctions([named(name) for name in ("a", "a", "b", "a")])
    assert [reward.name for reward in functions.all] == ["a", "a_2", "b", "a_3"]


def test_rewards_are_logged_apart_and_summed_by_weight(tmp_path):
    real = FeatureStatistics.from_features(features(real_images()))
    rewards = [SubsetReplaceReward({name: features}, {name: real}) for name in ("one", "two")]
    rewards[1].extractors["two"] = lambda images: features(images) + 1
    weights = [1.0, 3.0, 0.25]
    trainer = tiny_trainer(tmp_path, reward_funcs=[*rewards, bright], reward_weights=weights, max_steps=1)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    names = ["subset_replace", "subset_replace_2", "bright"]
    means = [logs[f"rewards/{name}/mean"] for name in names]
    assert len(set(means)) == 3 and all(logs[f"rewards/{name}/std"] > 0 for name in names)
    assert logs["reward"] == pytest.approx(sum(w * mean for w, mean in zip(weights, means, strict=True)))
    assert trainer.describe_run()["rewards"] == dict(zip(names, weights, strict=True))


@pytest.mark.parametrize("loss_type", ["grpo", "backprop"])
def test_a_text_to_image_policy_trains_on_joint_and_sample_wise_rewards(tmp_path, folder, loss_type):
    """Prompts in strata, a joint distance and PickScore, by both estimators."""
    real, captions = coloured(39)
    pick = pick_score(folder)
    joint = JointTextFeatures(pick.clip, pick.clip.prompts, scale=1)
    rewards = [
        SubsetReplaceReward(joint, FeatureStatistics.from_features(joint(real, captions))),
        pick,
    ]
    dataset = Dataset.from_dict({"prompt": captions, "topic": [prompt.split()[-1] for prompt in captions]})
    settings = {"sampler": "ode", "top_advantage_quantile": 1.0} if loss_type == "backprop" else {}
    trainer = DistributionRewardTrainer(
        model=stable_diffusion(ddim()),
        reward_funcs=rewards,
        args=tiny_config(
            tmp_path,
            max_steps=2,
            loss_type=loss_type,
            num_inference_steps=3,
            num_inference_steps_eval=3,
            stratify_by="topic",
            replace_size=3,
            reward_weights=[1.0, 0.1],
            eval_samplers=["ode"],
            **settings,
        ),
        train_dataset=dataset,
    )
    before = {name: value.clone() for name, value in trainer.policy.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/pick_score/mean" in entry]
    assert len(logs) == 2
    changed = [name for name, value in trainer.policy.model.named_parameters() if not torch.equal(value, before[name])]
    assert changed
    for row in trainer.slot_sampler.draw(8, 3).tolist():  # two thirds of the prompts are of cats
        assert [prompt.split()[-1] for prompt in (trainer.conditions[slot] for slot in row)].count("cat") == 2
