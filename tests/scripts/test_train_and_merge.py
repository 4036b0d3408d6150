# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import os
import re
import signal
from dataclasses import replace
from importlib.metadata import requires
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn

from tests.clip import coloured, save_tiny_clip
from tests.evaluation.images import encoded, pixels, project
from tests.helpers import features, real_images, tiny_config, tiny_pipeline, tiny_pool
from tests.policies_tiny import sd3
from trl_distreward import (
    DistributionRewardTrainer,
    FeatureStatistics,
    MergeCoefficientConfig,
    MergeCoefficientTrainer,
    SubsetReplaceReward,
    load_pipeline,
)
from trl_distreward.evaluation.decoding import StoredImage, decode_image
from trl_distreward.rewards import clip_score, hps_score, pick_score
from trl_distreward.scripts import arguments, merge, train

PROJECT = "tests.evaluation.images.project"

RECIPE = """
model: {folder}/base
feature_extractor: tests.helpers.features
real_statistics: {folder}/real.safetensors
output_dir: {folder}/out
max_steps: 2
reference_set_size: 24
num_subsets: 6
replace_size: 2
num_inference_steps: 4
num_inference_steps_eval: 5
learning_rate: 0.001
save_strategy: "no"
use_cpu: true
disable_tqdm: true
report_to: none
"""


@pytest.fixture
def recipe(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    FeatureStatistics.from_features(features(real_images())).save(tmp_path / "real.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def test_train_follows_the_recipe_which_the_command_line_overrides(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--max_steps", "3", "--use_peft", "--lora_r", "2", "--save_steps", "1"]
    train.main(arguments)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        f"step-{i}.png" for i in range(4)
    ]
    assert "  reward -" in capsys.readouterr().out
    assert load_pipeline(tmp_path / "out").transformer.config.num_classes == 3


def test_merge_follows_its_recipe_and_compares_with_what_is_cheap(recipe, tmp_path, capsys):
    write_merge_recipe(recipe, tmp_path)
    merge.main(["--config", str(recipe), "--initial_coefficients", "0.5,0,0,0.5"])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["| last", "| uniform", "| start", "| learnt"]
    learnt = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert len(learnt["coefficients"]["all"]) == 4 and "| learnt |" in (tmp_path / "out" / "README.md").read_text()
    assert load_pipeline(tmp_path / "out").transformer.config.num_classes == 3


def test_merging_needs_no_settings_but_models_and_a_reward(recipe, tmp_path, capsys):
    reward = ["--feature_extractor", "tests.helpers.features", "--real_statistics", str(tmp_path / "real.safetensors")]
    small = "--max_steps 2 --reference_set_size 24 --num_inference_steps 4 --use_cpu True".split()
    models = ["--model", str(tmp_path / "base"), "--checkpoints", *tiny_pool(tmp_path)]
    merge.main([*models, *reward, *small, "--output_dir", str(tmp_path / "out")])
    assert "| learnt |" in capsys.readouterr().out and (tmp_path / "out" / "coefficients.json").is_file()
    needed = {re.split(r"[<>=!~ ]", each)[0] for each in requires("trl-distreward") if "extra ==" not in each}
    assert MergeCoefficientConfig(output_dir=str(tmp_path), use_cpu=True).method == "cma" and "cma" in needed


def write_merge_recipe(recipe, folder):
    """Turns the recipe of training into one of merging, with 4 checkpoints."""
    train_only = ("num_subsets", "replace_size", "learning_rate")
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(train_only)]
    checkpoints = "".join(f"\n  - {path}" for path in tiny_pool(folder))
    recipe.write_text("\n".join([*lines, f"checkpoints:{checkpoints}", "num_generations: 3", "method: emanet"]))


@pytest.mark.parametrize(
    ("command", "kind", "written", "told"),
    [
        (train, DistributionRewardTrainer, "model_index.json", "eval_ode"),
        (merge, MergeCoefficientTrainer, "coefficients.json", "| learnt"),
    ],
)
def test_a_command_stops_at_sigterm_and_resumes(recipe, tmp_path, capsys, monkeypatch, command, kind, written, told):
    out, sent, training_step = tmp_path / "out", [], kind.training_step

    def with_signal(trainer, *args, **kwargs):
        if not sent and trainer.state.global_step == 1:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(kind, "training_step", with_signal)
    if command is merge:
        write_merge_recipe(recipe, tmp_path)
    given = ["--config", str(recipe), "--max_steps", "4", "--eval_strategy", "epoch"]
    command.main([*given, "--resume_from_checkpoint", "false"])
    printed = capsys.readouterr().out
    assert "Stopped after step 1 of 4" in printed and "--resume_from_checkpoint true" in printed
    assert told not in printed and not (out / written).exists()
    assert (out / "checkpoint-1").is_dir() and not (out / "samples" / "step-1.png").exists()
    command.main([*given, "--resume_from_checkpoint", "true"])
    printed = capsys.readouterr().out
    assert told in printed and "Stopped" not in printed and (out / written).exists()


def test_options_reach_the_policy(tmp_path):
    sd3().save_pretrained(tmp_path / "sd3")
    given, config = {"model": "x", "reward_funcs": ["my.reward"]}, tiny_config(tmp_path, guidance_scale=3.0)
    options = {"height": 4, "width": 8, "offload_text_encoders": True, "dtype": "bfloat16"}
    policy = train.load_policy(train.TrainArguments(**given, **options), config, str(tmp_path / "sd3"))
    assert (policy.size, policy.offload_text_encoders, policy.guidance_scale) == ((4, 8), True, 3.0)
    assert policy.model.dtype == torch.bfloat16
    policy = train.load_policy(train.TrainArguments(**given, dtype="bfloat16"), config, tiny_pipeline())
    assert policy.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="height=4: ClassConditionalPolicy has no"):
        train.load_policy(train.TrainArguments(**given, height=4), config, tiny_pipeline())


EXTRACTOR = {"feature_extractor": "tests.helpers.features"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no reward"),
        (EXTRACTOR, "give one of each"),
        ({"real_images": "folder"}, "needs feature_extractor or prompt_encoder"),
        ({**EXTRACTOR, "real_statistics": "r", "heldout_extractor": "clip"}, "heldout_statistics belong together"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.TrainArguments(model="x", **options)


@pytest.mark.parametrize("spec", ["pickscore", "hps_score", "tests.helpers.nothing"])
def test_wrong_rewards_are_named(spec):
    with pytest.raises(ValueError, match=f"'{spec}' (is unknown: choose|has wrong options|cannot be imported)"):
        arguments.find_reward(spec)


def test_rewards_are_known_by_name(tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    images, prompts = coloured(4)
    specs = {
        f"clip_score,source={clip},resize=torch": clip_score(clip, resize="torch"),
        f"pick_score,source={clip}": pick_score(clip),
        f"hps_score,source={clip}": hps_score(clip),
        "tests.helpers.features": features,
    }
    given = train.TrainArguments(model="x", reward_funcs=list(specs))
    rewards = arguments.build_rewards(given)
    for reward, expected in zip(rewards[:-1], list(specs.values())[:-1], strict=True):
        assert torch.equal(reward(images, prompts=prompts), expected(images, prompts=prompts))
    assert rewards[-1] is features
    metrics = arguments.build_metrics(given, rewards)
    assert list(metrics) == ["clip_score", "pick_score", "hps_score"]
    for part in (slice(0, 3), slice(3, 4)):
        metrics["pick_score"].update(images[part], prompts[part])
    mean = rewards[1](images, prompts=prompts).double().mean().item()
    assert metrics["pick_score"].compute() == pytest.approx(mean, rel=1e-6)


def test_prompts_may_be_in_any_column_of_a_saved_dataset(tmp_path):
    rows = {"caption": ["a cat", "a dog"], "prompt": ["x", "y"], "image": [1, 2]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    DatasetDict(test=Dataset.from_dict(rows)).save_to_disk(tmp_path / "split")

    def load(name, **options):
        given = train.TrainArguments(model="x", reward_funcs=["my.reward"], dataset_name=str(name), **options)
        return arguments.load_conditions(given)

    assert load(tmp_path / "one", prompt_column="caption").column_names == ["prompt", "image"]
    assert load(tmp_path / "one", prompt_column="caption")["prompt"] == ["a cat", "a dog"]
    split = load(tmp_path / "split", prompt_column="caption", dataset_split="test")
    assert split["prompt"] == ["a cat", "a dog"]
    for name, options, message in (
        (tmp_path / "one", {"prompt_column": "text"}, "no column .text., but caption, prompt, image"),
        (tmp_path / "split", {"dataset_split": "train"}, "split='train' is not in .*: choose one of test"),
        ("my-org/none", {}, "dataset my-org/none cannot be loaded"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load(name, **options)


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_the_reward_takes_a_split_of_real_images(tmp_path, distance):
    pictures = {name: [{"bytes": encoded(image)} for image in pixels(9, seed=len(name))] for name in ("train", "test")}
    features = Features({"picture": ImageColumn(), "caption": Value("string")})
    splits = {k: Dataset.from_dict({"picture": v, "caption": ["a"] * 9}, features) for k, v in pictures.items()}
    DatasetDict(splits).save_to_disk(tmp_path / "real")
    given = {"model": "x", "feature_extractor": PROJECT, "real_images": str(tmp_path / "real"), "distance": distance}
    options = train.TrainArguments(**given, real_split="test", real_resize=4)
    (reward,) = arguments.build_rewards(options)
    reduced = [decode_image(StoredImage("", image), resize=4) for image in pixels(9, seed=4)]
    expected = SubsetReplaceReward(project, project(torch.from_numpy(np.stack(reduced))), distance)
    images = torch.from_numpy(pixels(8, seed=7)).permute(0, 3, 1, 2)
    for each in (reward, expected):
        each.set_reference({"features": project(images)})
    assert reward.reference_distances["features"] == pytest.approx(expected.reference_distances["features"], rel=1e-4)
    with pytest.raises(ValueError, match="is not in .*real: choose one of train, test"):
        arguments.build_rewards(replace(options, real_split=None))


def test_options_take_numbers_or_words(tmp_path):
    shared = ["--model", "m", "--reward_funcs", "my.reward", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    for given, expected in ((["auto"], "auto"), (["20"], 20)):
        _, config = train.make_parser().parse_args_and_config([*shared, "--reference_refresh_steps", *given])
        assert config.reference_refresh_steps == expected


def test_dry_run_prints_a_prediction_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    train.main(["--config", str(recipe), "--dry-run", "--save_strategy", "steps"])
    printed = capsys.readouterr().out
    assert "2 updates on 1 x CPU" in printed and "network evaluations" in printed and printed.rstrip().endswith("fits")
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not (tmp_path / "out" / "samples").exists()
    monkeypatch.setattr(train, "dry_run", lambda trainer: SimpleNamespace(fits=False))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(recipe), "--dry-run"])
    assert stopped.value.code == 1 and "fits=False" in capsys.readouterr().out
