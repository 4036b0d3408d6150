# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from functools import partial

import pytest
import torch
from datasets import Dataset
from torch import nn

from tests.clip import coloured, save_tiny_clip, tiny_clip
from tests.helpers import features, real_images, tiny_config, tiny_reward, tiny_trainer
from tests.policies_parts import ddim, tokenizer
from tests.policies_tiny import stable_diffusion
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, JointTextFeatures, SubsetReplaceReward
from trl_distreward.metrics import CLIPEmbeddings
from trl_distreward.rewards import (
    HeadScore,
    PromptScore,
    aesthetic_score,
    clip_score,
    hps_score,
    load_linear_head,
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
        assert reward.__name__ == build.__name__ and reward.differentiable
        torch.testing.assert_close(reward(images=images, conditions=prompts, slots=None, trainer_state=None), values)
    tokens = tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():  # what PickScore's model card computes, by the model itself
        logits = tiny_clip()(
            pixel_values=clip.prepare(images), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).logits_per_image
    torch.testing.assert_close(pick_score(folder)(images, prompts), logits.diag(), rtol=1e-4, atol=1e-4)


def laion_head(*widths):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Dropout(0.2))][:-1])


def test_aesthetic_scores_are_linear_layers_on_the_embedding(folder, tmp_path):
    images, _ = coloured(5)
    clip = CLIPEmbeddings(tiny_clip(), tokenizer())
    # eleven layers: 10 comes after 2, whatever the alphabet says
    deep = laion_head(6, *[8] * 10, 1).eval()
    torch.save({f"layers.{name}": value for name, value in deep.state_dict().items()}, tmp_path / "head.pth")
    reward = aesthetic_score(tmp_path / "head.pth", folder)
    torch.testing.assert_close(reward(images=images, conditions=["ignored"] * 5), deep(clip(images))[:, 0])
    torch.save(nn.Linear(6, 1).state_dict(), tmp_path / "linear.pth")
    assert len(load_linear_head(tmp_path / "linear.pth")) == 1


def test_heads_that_do_not_fit_are_refused(folder, tmp_path):
    cases = {
        "other": (laion_head(5, 4, 1).state_dict(), "reads 5 numbers, the embedding of .* has 6"),
        "two": (laion_head(6, 2).state_dict(), "the last of one number"),
        "gap": ({**laion_head(6, 4, 1).state_dict(), "2.weight": torch.zeros(1, 3)}, "the last of one number"),
        "norm": ({**laion_head(6, 1).state_dict(), "running": torch.zeros(1)}, "holds .*running"),
    }
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message):
            aesthetic_score(tmp_path / f"{name}.pth", folder)
    with pytest.raises(ValueError, match="must give one score each"):
        HeadScore(lambda x: x.float().mean((2, 3)), nn.Linear(3, 2))(coloured(4)[0])


def test_scores_pass_gradients_to_images_and_none_to_weights(folder):
    images, prompts = coloured(4)
    clip = CLIPEmbeddings(tiny_clip(), tokenizer())
    for reward in (pick_score(folder, resize="torch"), PromptScore(clip), HeadScore(clip, nn.Linear(6, 1))):
        tracked = images.float().requires_grad_()
        scores = reward(images=tracked, conditions=prompts)
        (gradient,) = torch.autograd.grad(scores.sum(), tracked)
        assert (gradient != 0).flatten(1).any(dim=1).all()
        assert not any(p.requires_grad for p in reward.parameters())
        torch.testing.assert_close(scores.detach(), reward(images=images, conditions=prompts))
        ahead = tracked.detach() + 40 * gradient / gradient.abs().max()
        assert reward(images=ahead, conditions=prompts).sum() > scores.sum()


def test_heads_score_in_full_precision():
    images, head = coloured(4)[0], nn.Linear(3, 1)
    score = HeadScore(lambda x: x.float().mean((2, 3)), head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score(images=images)
    assert scores.dtype == torch.float32 and torch.equal(scores, score(images=images))


def bright(images, **kwargs):
    return images.float().mean(dim=(1, 2, 3)).tolist()


def dark(images, **kwargs):
    return [-value for value in bright(images)]


def test_rewards_are_logged_apart_and_weighed_together(tmp_path):
    trainer = tiny_trainer(
        tmp_path, reward_funcs=[tiny_reward(), bright, dark], reward_weights=[2.0, 0.5, 0.25], max_steps=1
    )
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    parts = [logs[f"rewards/{name}/mean"] for name in ("subset_replace", "bright", "dark")]
    assert parts[1] == pytest.approx(-parts[2]) and parts[1] > 0 > parts[0]
    assert logs["reward"] == pytest.approx(2 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2])
    assert all(logs[f"rewards/{name}/std"] > 0 for name in ("subset_replace", "bright", "dark"))


def test_functions_that_share_a_name_are_told_apart():
    def named(name):
        function = partial(bright)
        function.__name__ = name
        return function

    functions = RewardFunctions([named(name) for name in ("a", "a", "b", "a_2", "a")])
    assert functions.names == ["a", "a_3", "b", "a_2", "a_4"]  # each keeps its own where it is the first


def test_two_distribution_rewards_are_logged_apart(tmp_path):
    real = FeatureStatistics.from_features(features(real_images()))
    rewards = [SubsetReplaceReward({name: features}, {name: real}) for name in ("one", "two")]
    rewards[1].extractors["two"] = lambda images: features(images) + 1
    trainer = tiny_trainer(tmp_path, reward_funcs=rewards, reward_weights=[1.0, 3.0], max_steps=1)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    first, second = logs["rewards/subset_replace/mean"], logs["rewards/subset_replace_2/mean"]
    assert first != second and logs["reward"] == pytest.approx(first + 3 * second)
    assert trainer._describe_run()["rewards"] == {"subset_replace": 1.0, "subset_replace_2": 3.0}


@pytest.mark.parametrize("loss_type", ["grpo", "backprop"])
def test_a_text_to_image_policy_trains_on_joint_and_sample_wise_rewards(tmp_path, folder, loss_type):
    """Prompts in strata, a joint distance, PickScore and an aesthetic head, by both estimators."""
    real, captions = coloured(39)
    pick = pick_score(folder)
    joint = JointTextFeatures(pick.clip, pick.clip.prompts)
    rewards = [
        SubsetReplaceReward(joint, FeatureStatistics.from_features(joint(real, captions))),
        pick,
        HeadScore(pick.clip, nn.Linear(6, 1), name="head"),
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
            time_grid="auto",
            last_step_size=None,
            num_inference_steps=3,
            num_inference_steps_eval=3,
            stratify_by="topic",
            replace_size=3,
            reward_weights=[1.0, 0.1, 0.1],
            eval_samplers=["ode"],
            **settings,
        ),
        train_dataset=dataset,
    )
    before = {name: value.clone() for name, value in trainer.policy.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/pick_score/mean" in entry]
    assert len(logs) == 2 and all("rewards/head/mean" in entry for entry in logs)
    changed = [name for name, value in trainer.policy.model.named_parameters() if not torch.equal(value, before[name])]
    assert changed
    for row in trainer.slot_sampler.draw(8, 3).tolist():  # two thirds of the prompts are of cats
        assert [prompt.split()[-1] for prompt in (trainer.conditions[slot] for slot in row)].count("cat") == 2
