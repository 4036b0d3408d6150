# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import TrainingArguments

from tests.helpers import features, real_images, tiny_config, tiny_pipeline, tiny_reward, tiny_trainer, trained
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, calls_of, first_gradients, logged, weights
from trl_distreward import (
    DistributionRewardTrainer,
    FeatureDistance,
    FeatureStatistics,
    MergeCoefficientTrainer,
    SubsetReplaceReward,
)
from trl_distreward.policies import as_policy
from trl_distreward.trainer.estimators import ESTIMATORS

# ---- one step ----


@pytest.mark.parametrize("num_iterations", [1, 2, 3])
def test_only_the_first_update_of_a_rollout_generates_scores_and_prepares(tmp_path, num_iterations):
    trainer = tiny_trainer(tmp_path, max_steps=6, num_iterations=num_iterations, epsilon=0.2)
    calls = {name: calls_of(trainer, name) for name in ("rollout", "score", "prepare", "update")}
    trainer.train()
    rollouts = 6 // num_iterations
    assert [len(found) for found in calls.values()] == [rollouts, rollouts, rollouts, 6]


def test_rewards_and_kept_advantages_equal_a_recomputation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    (reward,) = trainer.rewards.of_sets
    calls = calls_of(reward, "score")
    trainer.train()
    (((subsets, new), rewards),) = calls
    assert sorted(map(len, map(set, subsets.tolist()))) == [2] * 6
    real = FeatureStatistics.from_features(features(real_images()))
    for b, slots in enumerate(subsets):
        updated = reward.features["features"].clone()
        updated[slots] = new["features"][2 * b : 2 * b + 2]
        distance = FeatureDistance(lambda x: x, real)
        distance.update(updated)
        assert rewards[b].item() == pytest.approx(-distance.compute(), rel=1e-9)
    advantages = (rewards - rewards.mean()) / rewards.std()
    top = advantages.topk(3).values.repeat_interleave(2).sort().values
    torch.testing.assert_close(trainer.batch.advantages.double().sort().values, top, atol=1e-6, rtol=1e-6)
    assert logged(trainer, "advantage_kept") == [0.5]


def test_new_images_have_the_conditions_of_their_slots(tmp_path):
    labels = []

    def spy(images, slots, **kwargs):
        labels.append((kwargs["labels"], slots))
        return torch.arange(len(images), dtype=torch.float64)

    dataset = Dataset.from_dict({"class_labels": [2, 2, 1, 2, 1]})
    args = tiny_config(tmp_path, max_steps=1, reward_weights=[1.0, 0.1])
    trainer = DistributionRewardTrainer(tiny_pipeline(), [tiny_reward(), spy], args, train_dataset=dataset)
    trainer.train()
    given, slots = labels[-1]
    assert torch.equal(given, trainer.conditions[slots.flatten()])
    assert torch.bincount(trainer.conditions, minlength=3)[0] == 0
    assert torch.bincount(trainer.conditions, minlength=3)[2] in (14, 15)  # three fifths of 24


@pytest.mark.parametrize("loss_type", ESTIMATORS)
def test_micro_batch_size_does_not_change_the_gradient(tmp_path, loss_type):
    settings = {"max_steps": 1, "max_grad_norm": 0, "rollout_batch_size": 4, "loss_type": loss_type}
    whole, pieces = (
        first_gradients(tiny_trainer(tmp_path, per_device_train_batch_size=size, **settings)) for size in (1000, 5)
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6 * max(1, gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "columns"), [({}, 1), ({"credit": "leave_one_in"}, 2), ({"control_variate": True}, 1)]
)
def test_images_of_a_subset_share_a_reward_unless_each_has_its_credit(tmp_path, options, columns):
    trainer = tiny_trainer(tmp_path, reward_funcs=tiny_reward(**options))
    scored = calls_of(trainer, "score")
    trainer.train()
    assert [rewards[0].shape for _, rewards in scored] == [(6, columns)] * 2


def test_functions_of_single_images_train_without_a_reference_set(tmp_path):
    settings = {"learning_rate": 3e-3, "num_subsets": 24, "num_inference_steps": 6, "max_steps": 30}
    trainer = trained(tmp_path, reward_funcs=lambda images, **kwargs: images.float().mean((1, 2, 3)), **settings)
    assert not logged(trainer, "seconds/refresh")
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 10


def test_equal_rewards_skip_the_update_with_a_warning(tmp_path, caplog):
    trainer = trained(tmp_path, max_steps=2, reward_funcs=lambda images, **kwargs: [0.1] * len(images))
    assert_same_weights(trainer.network, tiny_trainer(tmp_path).network)
    assert logged(trainer, "skipped_updates") == [1.0, 1.0] and "update is skipped" in caplog.text


def test_bad_features_skip_the_update_and_end_a_hopeless_run(tmp_path):
    reward = tiny_reward()
    trainer = trained(tmp_path, reward_funcs=reward, max_steps=3, max_skipped_updates=2, **SAVE_EVERY_STEP)
    reward.extractors["features"] = lambda images: features(images) * torch.nan
    before, trainer.args.max_steps = weights(trainer.network), 20
    with pytest.raises(RuntimeError, match="3 updates in a row .*features are not finite"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer.network).items())
    with pytest.raises(RuntimeError, match="3 updates in a row"):  # a new run counts from 0
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("part", ["velocity", "decode"])
def test_images_that_are_not_finite_are_not_taken_for_black_ones(tmp_path, part):
    trainer = tiny_trainer(tmp_path, max_steps=2, reference_update="rolling")
    whole = getattr(trainer.policy, part)

    def broken(*args):
        factors = torch.ones(len(args[-1]) if part == "decode" else len(args[1]), 1, 1, 1)
        factors[0] = torch.nan if trainer.state.global_step == 1 else 1.0
        return whole(*args) * factors

    setattr(trainer.policy, part, broken)
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0]
    assert trainer.rewards.of_sets[0].features["features"].isfinite().all()
    trainer.state.global_step = 1
    with pytest.raises(ValueError, match="samples are not finite"):
        trainer.evaluate()


@pytest.mark.parametrize("scale", [None, 3e38, 0.5])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, caplog, scale):
    """Whether it overflows under a large scale of float16's gradients, or is not finite by itself."""
    trainer = tiny_trainer(tmp_path, max_steps=3)
    if scale is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-30)
    compute, factor = trainer.estimator.loss, 1e6 if scale == 3e38 else float("nan")

    def broken(*args):
        loss, values = compute(*args)
        return loss * (factor if trainer.state.global_step == 0 else 1), values

    trainer.estimator.loss = broken
    before = weights(trainer.network)
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0]
    assert ("Update 0 is skipped: the gradient is not finite" in caplog.text) == (scale != 3e38)
    after = weights(trainer.network)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())


class UnknownPipeline(DiffusionPipeline):
    pass


def score(images, labels):
    return [0.0] * len(images)


def reward_of(extractor, dimension=8):
    return SubsetReplaceReward(extractor, FeatureStatistics.from_features(torch.randn(20, dimension)))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": "no/such/folder"}, FileNotFoundError, "no folder"),
        ({"model": UnknownPipeline()}, TypeError, "UnknownPipeline.*DiffusionPolicy"),
        ({"reward_funcs": reward_of(features, 5)}, ValueError, "dimension 8, but .*5"),
        ({"reward_funcs": reward_of(lambda x: features(x)[:1])}, ValueError, "must return \\(2, d\\)"),
        ({"reward_funcs": reward_of(lambda x: features(x) * float("nan"))}, ValueError, "NaN or infinite"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "2 for 1 reward functions"),
        ({"reward_funcs": [tiny_reward(), tiny_reward()]}, ValueError, "share names"),
        ({"reward_funcs": lambda images, **kwargs: [0.0] * len(images), "best_of_n": 2}, ValueError, "best_of_n=2"),
        ({"metric_for_best_model": "eval_fid"}, ValueError, "choose one of eval_sde_distance_features"),
        ({"metric_for_best_model": "ode_distance_features", "greater_is_better": True}, ValueError, "to False"),
        ({"metric_for_best_model": "eval_ode_score", "eval_metrics": {"score": score}}, ValueError, "to True"),
        ({"sde_window_size": 9}, ValueError, "sde_window_size=9 must lie in 1 to 3, the number of steps with noise"),
        ({"num_inference_steps_eval": 1, "last_step_size": 0.1}, ValueError, "last_step_size needs at least 2 steps"),
        ({"noise_level": 0.0}, ValueError, "noise_level=0.0 .* no step with noise to train"),
    ],
)
def test_misfits_are_refused_before_training(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny_trainer(tmp_path, **kwargs)


def test_other_configurations_are_refused(tmp_path):
    other = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for args, name in ((other, "TrainingArguments"), ({"max_steps": 1}, "dict")):
        with pytest.raises(TypeError, match=f"args is a {name}: pass a DiffusionDistributionConfig"):
            DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), args)
        with pytest.raises(TypeError, match=f"args is a {name}: pass a MergeCoefficientConfig"):
            MergeCoefficientTrainer(tiny_pipeline(), ["a", "b"], tiny_reward(), args)


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [("class_labels", [0, 3], "0 to 2"), ("y", [0], "none that may hold class labels")],
)
def test_labels_that_the_model_does_not_know_are_refused(tmp_path, column, labels, message):
    dataset = Dataset.from_dict({column: labels})
    with pytest.raises(ValueError, match=message):
        DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), tiny_config(tmp_path), train_dataset=dataset)


def test_a_reward_function_that_returns_another_number_of_values_is_named(tmp_path):
    def short(images, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="'short' returned 1 values for 2 images"):
        tiny_trainer(tmp_path, reward_funcs=short)


def test_guidance_is_that_of_a_given_policy(tmp_path):
    policy = as_policy(tiny_pipeline(), guidance_scale=2.0)
    trainer = tiny_trainer(tmp_path, model=policy)
    assert trainer.args.guidance_scale == 2.0 and trainer.policy is policy  # as the card says
    with pytest.raises(ValueError, match="guidance_scale=4.0, but the policy was made with 2.0"):
        tiny_trainer(tmp_path, model=policy, guidance_scale=4.0)


def test_subsets_must_divide_among_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    tiny_trainer(tmp_path)
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    with pytest.raises(ValueError, match="num_subsets=6 must be a multiple of the 4 processes"):
        tiny_trainer(tmp_path)
