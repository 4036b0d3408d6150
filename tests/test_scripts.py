# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from tests.clip import coloured, save_tiny_clip
from tests.helpers import features, real_images, tiny_config, tiny_pipeline, tiny_pool
from tests.policies_tiny import sd3
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, MergeCoefficientTrainer, load_pipeline
from trl_distreward.rewards import clip_score, hps_score, pick_score
from trl_distreward.scripts import arguments, cli, evaluate, merge, statistics, train

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
log_rewards: true
"""
# Fields of the recipe that a merge does not have, or that do nothing in this one
TRAIN_ONLY = ("log_rewards", "num_subsets", "replace_size", "learning_rate")


@pytest.fixture
def recipe(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    FeatureStatistics.from_features(features(real_images())).save(tmp_path / "real.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def test_train_follows_the_recipe_and_the_command_line_wins(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--max_steps", "3", "--use_peft", "--lora_r", "2", "--save_steps", "1"]
    train.main(arguments)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        f"step-{i}.png" for i in range(4)
    ]
    printed = capsys.readouterr().out
    assert "Step 3" in printed and "6 subsets: " in printed and "advantage" in printed
    assert load_pipeline(tmp_path / "out").transformer.config.num_classes == 3


def test_merge_follows_its_recipe_and_compares_with_what_is_cheap(recipe, tmp_path, capsys, monkeypatch):
    computed = []

    def compute(argv):
        computed.append(argv[argv.index("--output") + 1])
        real = FeatureStatistics.load(tmp_path / "real.safetensors")
        real.metadata["source"] = argv[0]
        real.save(computed[-1])

    monkeypatch.setattr(statistics, "main", compute)
    lines = [line for line in recipe.read_text().splitlines() if line.partition(":")[0] not in TRAIN_ONLY]
    lines = [line.replace("real_statistics:", "real_images:") for line in lines]
    checkpoints = "".join(f"\n  - {path}" for path in tiny_pool(tmp_path))
    recipe.write_text("\n".join([*lines, f"checkpoints:{checkpoints}", "num_generations: 3", "method: cma"]))
    merge.main(["--config", str(recipe), "--initial_coefficients", "0.5,0,0,0.5", "--baselines", "grid", "emanet"])
    assert computed == [str(tmp_path / "out" / "real_statistics.safetensors")]  # once, for all methods
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["| last", "| uniform", "| start", "| grid", "| emanet", "| learnt"]
    learnt = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert learnt["recipe"]["initial_coefficients"] == [0.5, 0, 0, 0.5] and len(learnt["coefficients"]["all"]) == 4
    assert "| learnt |" in (tmp_path / "out" / "README.md").read_text()
    assert load_pipeline(tmp_path / "out").transformer.config.num_classes == 3
    with pytest.raises(ValueError, match="are unknown, or the method itself: choose from emanet, grid"):
        merge.main(["--config", str(recipe), "--baselines", "cma"])
    made = ["--initial_coefficients", "uniform", "--coefficient_map", "softmax", "--checkpoint_stds", *"1234"]
    started = sorted(tmp_path.glob("new/**"))
    with pytest.raises(ValueError, match="set coefficient_map='affine'"):  # before the method itself is run
        options = ["--baselines", "grid", "--output_dir", str(tmp_path / "new")]
        merge.main(["--config", str(recipe), *made, *options])
    assert sorted(tmp_path.glob("new/**")) == started
    with pytest.raises(ValueError, match="nothing to merge"):
        given = ["--model", "m", "--reward_funcs", "my.reward", "--use_cpu", "True"]
        merge.main([*given, "--output_dir", str(tmp_path / "none")])


def terminate_once(monkeypatch, kind, output_dir, step):
    """SIGTERM reaches this process in update `step` of the run in `output_dir`, the first time."""
    sent = []
    training_step = kind.training_step

    def with_signal(trainer, *args, **kwargs):
        if not sent and Path(trainer.args.output_dir) == output_dir and trainer.state.global_step == step - 1:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(kind, "training_step", with_signal)


def test_train_ends_at_sigterm_and_resumes(recipe, tmp_path, capsys, monkeypatch):
    pushed, out = [], tmp_path / "out"
    monkeypatch.setattr(DistributionRewardTrainer, "push_to_hub", lambda *_, **__: pushed.append("whole"))
    monkeypatch.setattr(DistributionRewardTrainer, "_push_from_checkpoint", lambda *_: pushed.append("checkpoint"))
    monkeypatch.setattr(DistributionRewardTrainer, "init_hf_repo", lambda *_, **__: None)
    terminate_once(monkeypatch, DistributionRewardTrainer, out, 2)
    given = ["--config", str(recipe), "--max_steps", "4", "--push_to_hub", "True"]
    given += ["--eval_strategy", "epoch", "--log_samples", "True"]
    train.main([*given, "--resume_from_checkpoint", "false"])
    printed = capsys.readouterr().out
    assert "Stopped by SIGTERM after step 2 of 4" in printed and "--resume_from_checkpoint true" in printed
    assert pushed == ["checkpoint"] and "eval_ode" not in printed and not (out / "model_index.json").exists()
    assert (out / "checkpoint-2").is_dir() and not (out / "samples" / "step-2.png").exists()
    train.main([*given, "--resume_from_checkpoint", "true"])
    printed = capsys.readouterr().out
    assert pushed[-1] == "whole" and "eval_ode" in printed and "SIGTERM" not in printed


@pytest.mark.parametrize("where", ["out", "out/baselines/cma"])
def test_merge_ends_at_sigterm_and_resumes(recipe, tmp_path, capsys, monkeypatch, where):
    lines = [line for line in recipe.read_text().splitlines() if line.partition(":")[0] not in TRAIN_ONLY]
    checkpoints = "".join(f"\n  - {path}" for path in tiny_pool(tmp_path))
    recipe.write_text("\n".join([*lines, f"checkpoints:{checkpoints}", "num_generations: 3", "method: emanet"]))
    given = ["--config", str(recipe), "--max_steps", "3", "--baselines", "cma", "grid"]
    terminate_once(monkeypatch, MergeCoefficientTrainer, tmp_path / where, 2)
    merge.main(given)
    printed = capsys.readouterr().out
    assert "Stopped by SIGTERM after step 2 of 3" in printed and f"checkpoint in {tmp_path / where}" in printed
    assert "| learnt" not in printed and not (tmp_path / "out" / "coefficients.json").exists()
    assert (tmp_path / where / "checkpoint-2").is_dir() and not (tmp_path / "out" / "baselines" / "grid").exists()
    steps = []
    update = MergeCoefficientTrainer.training_step
    monkeypatch.setattr(
        MergeCoefficientTrainer,
        "training_step",
        lambda t, *a, **kw: steps.append(t.args.method) or update(t, *a, **kw),
    )
    merge.main([*given, "--resume_from_checkpoint", "true"])
    assert "| learnt" in capsys.readouterr().out and (tmp_path / "out" / "coefficients.json").exists()
    done = {"out": ["emanet"] + 3 * ["cma"], "out/baselines/cma": ["cma"]}
    assert steps == done[where] + 3 * ["grid"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--feature_extractor", "no.such.module"], "'no.such.module' cannot be imported"),
        (["--reward_funcs", "tests.helpers.nothing"], "'tests.helpers.nothing' cannot be imported"),
    ],
)
def test_paths_that_do_not_import_are_named(recipe, extra, message):
    with pytest.raises(ValueError, match=message):
        train.main(["--config", str(recipe), *extra])


def test_options_of_the_policy_are_passed_on(tmp_path):
    sd3().save_pretrained(tmp_path / "sd3")
    given = {"model": "x", "reward_funcs": ["my.reward"]}
    options = {"height": 4, "width": 8, "offload_text_encoders": True, "cache_size": 7, "dtype": "bfloat16"}
    config = tiny_config(tmp_path, guidance_scale=3.0)
    policy = train.load_policy(train.TrainArguments(**given, **options), config, str(tmp_path / "sd3"))
    assert (policy.size, policy.offload_text_encoders, policy.cache_size) == ((4, 8), True, 7)
    assert policy.guidance_scale == 3.0 and policy.model.dtype == torch.bfloat16
    pipeline = tiny_pipeline()
    assert train.load_policy(train.TrainArguments(**given), config, pipeline).model.dtype == torch.float32
    policy = train.load_policy(train.TrainArguments(**given, dtype="bfloat16"), config, pipeline)
    assert policy.model.dtype == torch.bfloat16
    policy = train.load_policy(train.TrainArguments(**given, cache_size=0), config, str(tmp_path / "sd3"))
    assert policy.cache_size == 0
    for options in ({"cache_size": -1}, {"height": 0}):
        with pytest.raises(ValueError, match="must be"):
            train.load_policy(train.TrainArguments(**given, **options), config, str(tmp_path / "sd3"))
    with pytest.raises(ValueError, match="height=4: ClassConditionalPolicy has no such argument"):
        train.load_policy(train.TrainArguments(**given, height=4), config, pipeline)


EXTRACTOR = {"feature_extractor": "tests.helpers.features"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no reward"),
        (EXTRACTOR, "goes together with real_statistics or real_images"),
        ({"real_images": "folder"}, "goes together with"),
        ({"prompt_encoder": "clip", "real_statistics": "r"}, "without prompts: give dataset_name"),
        ({**EXTRACTOR, "real_statistics": "r", "heldout_extractor": "clip"}, "heldout_statistics go together"),
        ({"reward_funcs": ["pickscore"]}, "'pickscore' is unknown: give one of clip_score, pick_score, hps_score"),
        ({"reward_funcs": ["clip_score,colour=3"]}, "no option colour: clip_score takes source, tokenizer"),
        ({"reward_funcs": ["hps_score,source="]}, "lacks source: write 'hps_score,source=…'"),
        ({"reward_funcs": ["my.reward,source=x"]}, "a function of your own: it takes no source"),
        ({"reward_funcs": ["my.reward"], "credit": "leave_one_in"}, "credit='leave_one_in' does nothing without"),
        ({**EXTRACTOR, "real_statistics": "r", "prompt_scale": 2.0}, "prompt_scale=2.0 does nothing without"),
        (
            {**EXTRACTOR, "real_statistics": "r", "real_resize": 256},
            "real_resize=256 does nothing without real_images",
        ),
        ({**EXTRACTOR, "real_statistics": "r", "dataset_split": "test"}, "does nothing without dataset_name"),
        ({"reward_funcs": ["my.reward"], "lora_r": 32}, "lora_r=32 does nothing without use_peft"),
    ],
)
def test_rewards_that_cannot_be_are_told_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        train.TrainArguments(model="x", **options)


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
    rewards = arguments.build_rewards(given, str(tmp_path))
    for reward, expected in zip(rewards[:-1], list(specs.values())[:-1], strict=True):
        assert torch.equal(reward(images, conditions=prompts), expected(images, conditions=prompts))
    assert rewards[-1] is features
    metrics = arguments.build_metrics(given, rewards)
    assert list(metrics) == ["clip_score", "pick_score", "hps_score"]
    for part in (slice(0, 3), slice(3, 4)):
        metrics["pick_score"].update(images[part], prompts[part])
    mean = rewards[1](images, conditions=prompts).double().mean().item()
    assert metrics["pick_score"].compute() == pytest.approx(mean, rel=1e-6)


def test_prompts_may_be_in_any_column_of_a_saved_dataset(tmp_path):
    rows = {"caption": ["a cat", "a dog"], "prompt": ["x", "y"], "image": [1, 2]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    DatasetDict(test=Dataset.from_dict(rows)).save_to_disk(tmp_path / "split")
    given = {"model": "x", "reward_funcs": ["tests.helpers.features"]}

    def load(name, **options):
        return arguments.load_conditions(train.TrainArguments(dataset_name=str(tmp_path / name), **given, **options))

    assert load("one")["prompt"] == ["x", "y"]
    assert load("one", prompt_column="caption")["prompt"] == ["a cat", "a dog"]
    assert load("split", prompt_column="caption", dataset_split="test")["prompt"] == ["a cat", "a dog"]
    for name, options, message in (
        ("one", {"prompt_column": "text"}, r"columns \['caption', 'prompt', 'image'\], none of them 'text'"),
        ("one", {"dataset_split": "test"}, "has no splits"),
        ("split", {}, "dataset_split='train' is not in .*, which has test"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name, **options)
    with pytest.raises(OSError, match="the dataset my-org/none cannot be loaded"):
        arguments.load_conditions(train.TrainArguments(dataset_name="my-org/none", **given))


def test_command_lists_its_commands_and_every_option(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl-distreward"])
    cli.main()
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["trl-distreward", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"trl-distreward {version('trl-distreward')}\n"
    monkeypatch.setattr(sys, "argv", ["trl-distreward", "fly"])
    with pytest.raises(SystemExit, match="no command 'fly'"):
        cli.main()
    result = subprocess.run(
        [sys.executable, "-m", "trl_distreward.scripts.cli", "train", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for option in ("--model", "--num_subsets", "--reference_update", "--learning_rate", "--lora_r"):
        assert option in result.stdout


REWARD = ["--feature_extractor", "tests.helpers.features", "--real_statistics", "real.safetensors"]


def told(monkeypatch, *argv):
    """What a command ends with."""
    monkeypatch.setattr(sys, "argv", ["trl-distreward", *map(str, argv)])
    with pytest.raises((SystemExit, Exception)) as stopped:
        cli.main()
    return stopped.value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["statistics", "none", "--output", "s.npz"], "statistics: output='s.npz' must end in .safetensors."),
        (
            ["evaluate", "--model", "m.npz", "--sampler", "ode"],
            "evaluate: --sampler: of a pipeline's images, but m.npz",
        ),
        (["evaluate", "--compare", "a.json", "b.json"], "evaluate: no report at a.json."),
        (["train", "--config", "none.yaml"], "train: [Errno 2] No such file or directory: 'none.yaml'"),
        (["convert", "sit", "none.pt", "taken"], "convert: taken is not empty: name a folder that is not there yet."),
        (["train", "--model", "m", "--output_dir", "out", "--use_cpu", "True"], "train: there is no reward"),
        (["train", "--model", "m", "--oops", "1"], "train: "),
        (["train", "--model", "m", "--num_subset", "8"], "train: "),  # no name is guessed
        (["train", "--config", "bad.yaml"], "train: mapping values are not allowed here"),
        (["train", "--config", "taken"], "train: [Errno 21] Is a directory: 'taken'"),
        (["convert", "sit", "taken", "out"], "convert: [Errno 21] Is a directory: 'taken'"),
        (
            [*("train", "--model", "taken", "--output_dir", "taken", "--use_cpu", "True"), *REWARD],
            "train: output_dir='taken' is the model's own folder",
        ),
        (
            [
                *("train", "--config", "optim.yaml", "--model", "m", "--output_dir", "out", "--use_cpu", "True"),
                *REWARD,
            ],
            "train: none is not a valid OptimizerNames",
        ),
        (["merge", "--model", "m", "--output_dir", "out", "--use_cpu", "True"], "merge: there is no reward"),
    ],
)
def test_errors_of_use_are_told_in_a_line_and_may_be_traced(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "bad.yaml").write_text("model: a: b")
    (tmp_path / "optim.yaml").write_text("optim: none")
    error = told(monkeypatch, *argv)
    assert isinstance(error, SystemExit) and error.code.startswith(f"trl-distreward {message}"), error
    monkeypatch.setenv("TRL_DISTREWARD_TRACEBACK", "1")
    assert not isinstance(told(monkeypatch, *argv), SystemExit)


def test_faults_keep_their_trace(monkeypatch):
    faults = (
        lambda _: int("x"),
        lambda _: json.loads("{"),
        lambda _: torch.zeros(2).numpy().reshape(3),
        lambda _: 1 + "",
    )
    for fault in faults:
        monkeypatch.setattr(evaluate, "main", fault)
        assert isinstance(told(monkeypatch, "evaluate"), ValueError | TypeError)


def test_multi_process_commands_tell_errors_in_a_line_as_well(tmp_path):
    command = [sys.executable, "-m", "trl_distreward.scripts.report", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("python -m trl_distreward.scripts.report: ")


def test_model_that_is_nowhere_is_told_as_no_folder_and_no_repository(monkeypatch):
    def answer(*_, **__):
        try:
            raise OfflineModeIsEnabled
        except OfflineModeIsEnabled as offline:
            raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub") from offline

    monkeypatch.setattr("trl_distreward.policies.loading.snapshot_download", answer)
    with pytest.raises(
        ConnectionError, match="no folder imagse/samples, so that it was looked for on the Hub: HF_HUB_OFFLINE is set"
    ):
        load_pipeline("imagse/samples")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            train,
            ("usage: trl-distreward train ", "\n    trl-distreward train --config recipe.yaml\n", "default: 5000"),
        ),
        (merge, ("usage: trl-distreward merge ", "\n    trl-distreward merge --config recipe.yaml\n")),
        (statistics, ("--output", "--features", "--skip-corrupt", "--streaming", "--work-dir")),
        (evaluate, ("--model", "--compare", "--real", "--spread", "--num-images", "--save-npz", "--image-column")),
    ],
)
def test_help_is_a_manual(command, options):
    shown = command.make_parser().format_help()
    assert "torchrun" in shown or "accelerate launch" in shown
    assert all(option in shown for option in options)


def test_fields_that_take_a_number_or_a_word_take_both_from_the_command_line(tmp_path):
    shared = ["--model", "m", "--reward_funcs", "my.reward", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    _, config = train.make_parser().parse_args_and_config([*shared, "--reference_refresh_steps", "auto"])
    assert config.reference_refresh_steps == "auto"
    words = ["--loss_type", "backprop", "--num_subsets", "10", "--backprop_steps"]
    for given, expected in (("random", "random"), ("3", 3)):
        _, config = train.make_parser().parse_args_and_config([*shared, *words, given])
        assert config.backprop_steps == expected and config.reference_refresh_steps == 10


def test_dry_run_prints_what_the_run_takes_and_leaves_nothing(recipe, tmp_path, capsys, monkeypatch):
    train.main(["--config", str(recipe), "--dry-run", "--save_strategy", "steps"])
    printed = capsys.readouterr().out
    assert "2 steps on CPU" in printed and "network evaluations" in printed and printed.rstrip().endswith("fits")
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not (tmp_path / "out" / "samples").exists()
    train.main(["--config", str(recipe), "--dry-run", "--recipe", "recommended", "--log_rewards", "False"])
    assert capsys.readouterr().out.rstrip().endswith("fits")
    monkeypatch.setattr("trl_distreward.trainer.dry_run.memory_capacity", lambda *_: 1000.0)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(recipe), "--dry-run"])
    assert stopped.value.code == 1 and "does not fit" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="this run cannot fit"):
        train.main(["--config", str(recipe)])
