# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What is said before training."""

import logging

import pytest
import torch
from datasets import Dataset

from tests.helpers import (
    features,
    real_images,
    tiny_config,
    tiny_merge_trainer,
    tiny_pipeline,
    tiny_reward,
    tiny_trainer,
)
from trl_distreward import (
    DistributionRewardTrainer,
    FeatureDistance,
    FeatureStatistics,
    KernelDistance,
    SubsetReplaceReward,
)
from trl_distreward.trainer.sizing import FEWEST_REWARDS, misleading_sets, noisy_rewards, show_messages


def warnings_of(trainer):
    return [*misleading_sets(trainer), *noisy_rewards(trainer)]


def wide(images):
    return torch.cat([features(images)] * 4, dim=1) + 0.0  # 32 dimensions


def refuse(*_):
    raise AssertionError("the network ran")


def test_sizes_are_said_and_nothing_is_run(tmp_path, caplog):
    pipeline = tiny_pipeline()
    pipeline.transformer.register_forward_pre_hook(refuse)
    with caplog.at_level(logging.INFO, "trl_distreward"):
        trainer = tiny_trainer(tmp_path, pipeline, max_steps=4, best_of_n=2)
    (said,) = (record.message for record in caplog.records if "The run: 4 updates" in record.message)
    # 6 x 2 x 2 new images of 4 steps in each of 4 rollouts, and a set of 24 made once
    trained = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    for line in (
        "4 rollouts of 6 subsets x 2 images, the best of 2 each",
        "120 images for training, 24 in an evaluation",
        f"{trained:,} of {sum(p.numel() for p in trainer.network.parameters()):,} weights trained",
        "reference set: 24 images, generated 1 x;",
        "no train_dataset, so labels are all 3 classes in balance",
    ):
        assert f"- {line}" in said


@pytest.mark.parametrize(
    ("set_up", "settings", "times"), [(False, {}, 1), (True, {}, 1), (False, {"log_level": "error"}, 0)]
)
def test_messages_are_seen_once_unless_the_program_says_otherwise(
    tmp_path, monkeypatch, capsys, set_up, settings, times
):
    for name, level in (("trl_distreward", logging.NOTSET), (None, logging.WARNING)):  # as in a fresh process
        for attribute, value in (("handlers", []), ("level", level), ("propagate", True)):
            monkeypatch.setattr(logging.getLogger(name), attribute, value)
    if set_up:
        logging.basicConfig()
    show_messages(tiny_config(tmp_path, **settings))
    logging.getLogger("trl_distreward.trainer").info("sizes")
    assert capsys.readouterr().err.count("sizes") == times


def test_sets_smaller_than_their_features_are_warned_of_with_both_numbers(tmp_path):
    assert warnings_of(tiny_trainer(tmp_path, num_subsets=FEWEST_REWARDS)) == []
    real = FeatureStatistics.from_features(wide(real_images()))
    reward = SubsetReplaceReward(wide, real)
    held_out = {"held_out": FeatureDistance(wide, real)}
    small = tiny_trainer(tmp_path, None, reward, eval_metrics=held_out, num_eval_images=30, num_subsets=8)
    found = warnings_of(small)
    assert len(found) == 3
    assert "reference_set_size=24 is less than the 32 dimensions of distance_features" in found[0]
    for key in ("distance_features", "held_out"):
        assert any(f"num_eval_images=30 is less than the 32 dimensions of {key}" in each for each in found[1:])
    kernel = SubsetReplaceReward(wide, wide(real_images()), "kernel")
    assert isinstance(kernel.distances["features"], KernelDistance)
    assert warnings_of(tiny_trainer(tmp_path, None, kernel, num_subsets=8)) == []


def test_classes_without_images_are_warned_of(tmp_path):
    dataset = Dataset.from_dict({"label": [0, 2]})
    arguments = tiny_config(tmp_path, num_subsets=8)
    trainer = DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), arguments, train_dataset=dataset)
    assert warnings_of(trainer) == ["reference_set_size=24 has no image of 1 of the model's 3 classes."]
    merge = tiny_merge_trainer(tmp_path / "merge", train_dataset=dataset)
    assert list(misleading_sets(merge)) == ["reference_set_size=20 has no image of 1 of the model's 3 classes."]


@pytest.mark.parametrize(
    ("settings", "reward", "warned"),
    [
        ({"num_subsets": 7}, {}, "num_subsets=7 gives 7 rewards"),
        ({"num_subsets": 8}, {}, None),
        ({"num_subsets": 4, "replace_size": 2}, {"credit": "leave_one_in"}, None),
        (
            {"num_subsets": 12, "num_generations": 4, "advantage_normalization": "group"},
            {},
            "num_generations=4 gives 4 rewards",
        ),
        ({"num_subsets": 2, "loss_type": "backprop"}, {}, None),
    ],
)
def test_so_few_rewards_that_their_spread_is_noise_are_warned_of(tmp_path, settings, reward, warned):
    found = list(noisy_rewards(tiny_trainer(tmp_path, reward_funcs=tiny_reward(**reward), **settings)))
    assert (warned is None and found == []) or warned in found[0]


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_features_of_another_dimension_are_refused_before_the_network_runs(tmp_path, distance):
    pipeline = tiny_pipeline()
    pipeline.transformer.register_forward_pre_hook(refuse)
    reward = SubsetReplaceReward(features, wide(real_images()), distance)
    with pytest.raises(ValueError, match="dimension 8, but the statistics they are compared with have 32"):
        tiny_trainer(tmp_path, pipeline, reward)
    metric = {"other": FeatureDistance(features, wide(real_images()), distance)}
    with pytest.raises(ValueError, match="dimension 8, but the statistics they are compared with have 32"):
        tiny_trainer(tmp_path, pipeline, eval_metrics=metric)


@pytest.mark.parametrize(("size", "warned"), [("4x4", False), ("8x8", True), ("4x8", True), (None, False)])
def test_real_images_of_another_size_are_warned_of(tmp_path, caplog, size, warned):
    held = {} if size is None else {"image_size": size}
    real = FeatureStatistics.from_features(features(real_images()), held)
    tiny_trainer(tmp_path, reward_funcs=SubsetReplaceReward(features, real))
    assert (f"compares images of 4x4 pixels with real ones of {size}" in caplog.text) == warned
