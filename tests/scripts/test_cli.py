# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from trl_distreward import __version__, load_pipeline
from trl_distreward.scripts import cli, convert, evaluate, merge, report, statistics, train

CPU = ["--output_dir", "out", "--use_cpu", "True"]
REWARD = ["--feature_extractor", "tests.helpers.features", "--real_statistics", "real.safetensors"]


def outcome(monkeypatch, *argv):
    """Exception that ends a command."""
    monkeypatch.setattr(sys, "argv", ["trl-distreward", *map(str, argv)])
    with pytest.raises((SystemExit, Exception)) as stopped:
        cli.main()
    return stopped.value


def test_command_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl-distreward"])
    cli.main()
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["trl-distreward", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"trl-distreward {__version__}\n"
    assert "no command 'fly'" in str(outcome(monkeypatch, "fly"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["statistics", "none/", "--output", "s.npz"], "statistics: "),
        (["evaluate", "--compare", "a.json", "b.json"], "evaluate: [Errno 2] No such file or directory: 'a.json'"),
        (["train", "--config", "none.yaml"], "train: [Errno 2] No such file or directory: 'none.yaml'"),
        (
            ["convert", "sit", "none.pt", "taken"],
            "convert: taken is not empty: name a folder that does not exist yet.",
        ),
        (["train", "--model", "m", *CPU], "train: there is no reward"),
        (["train", "--oops", "1"], "train: --oops: no such option, see --help."),
        (["train", "--num_subset", "8"], "train: --num_subset: did you mean --num_subsets?"),  # and not abbreviated
        (["train", "--config=typos.yaml"], "train: max_step: did you mean max_steps? flying: no such option"),
        (["train", "--config", "bad.yaml"], "train: mapping values are not allowed here"),
        (["train", "--config", "types.yaml"], "train: argument --max_steps/--max-steps: invalid int value: '[2]'"),
        (["train", "--config"], "train: --config: name a YAML file"),
        (["train", "--model", "m", "--max_steps", "x", *CPU, *REWARD], "train: argument --max_steps/--max-steps: inv"),
        (["train", *CPU, *REWARD], "train: the following arguments are required: --model; see --help."),
        (["evaluate", "--modell", "m"], "evaluate: --modell: did you mean --model?"),
        (["convert", "sit", "a", "b", "--privat"], "convert: --privat: did you mean --private?"),
        (["convert", "sit", "taken", "out"], "convert: [Errno 21] Is a directory: 'taken'"),
        (["train", "--model", "out", *CPU, *REWARD], "train: output_dir='out' is the folder of the model"),
        (["merge", "--model", "m", *CPU], "merge: there is no reward"),
        (["report", "none"], "report: "),
    ],
)
def test_errors_are_told_in_a_line_and_may_be_traced(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "bad.yaml").write_text("model: a: b")
    (tmp_path / "typos.yaml").write_text("max_step: 2\nflying: true\nmodel: m")
    (tmp_path / "types.yaml").write_text("max_steps: [2]\nmodel: m\noutput_dir: out")
    error = outcome(monkeypatch, *argv)
    assert isinstance(error, SystemExit) and error.code.startswith(f"trl-distreward {message}"), error
    assert "\n" not in error.code
    assert not isinstance(outcome(monkeypatch, *argv, "--debug"), SystemExit)


def test_a_recipe_may_name_one_value_where_several_may_be(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\nreward_funcs: clip_score\nlearning_rate: 2e-5\noutput_dir: {tmp_path}\nuse_cpu: true")
    arguments, config = train.make_parser().parse_args_and_config(["--config", str(path)])
    assert arguments.reward_funcs == ["clip_score"] and config.learning_rate == 2e-5


def test_faults_keep_their_trace(monkeypatch):
    monkeypatch.setattr(evaluate, "main", lambda _: 1 + "")
    assert isinstance(outcome(monkeypatch, "evaluate"), TypeError)


def test_ctrl_c_is_no_fault(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "main", interrupted)
    assert outcome(monkeypatch, "evaluate").code == "trl-distreward evaluate: interrupted."


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "trl_distreward", "report", "--outptu", "none"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "trl-distreward report: --outptu: did you mean --output?\n"


def test_missing_models_are_neither_folders_nor_repositories(monkeypatch):
    def answer(*_, **__):
        try:
            raise OfflineModeIsEnabled
        except OfflineModeIsEnabled as offline:
            raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub") from offline

    monkeypatch.setattr("trl_distreward.policies.loading.snapshot_download", answer)
    with pytest.raises(
        ConnectionError, match="no folder imagse/samples in .*: if you meant one.*. On the Hub: HF_HUB_"
    ):
        load_pipeline("imagse/samples")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            train,
            (
                "usage: trl-distreward train ",
                "\n    trl-distreward train --config recipe.yaml\n",
                "accelerate launch",
                *("--model", "--num_subsets", "--reference_update", "--learning_rate", "--lora_r", "default: "),
            ),
        ),
        (merge, ("\n    trl-distreward merge --config recipe.yaml\n", "accelerate launch", "--checkpoints")),
        (statistics, ("torchrun", "--output", "--features", "--skip-corrupt", "--streaming", "--work-dir")),
        (evaluate, ("torchrun", "--model", "--compare", "--real", "--spread", "--num-images")),
        (convert, ("trl-distreward convert sit",)),
        (report, ("RUN_DIR", "--output")),
    ],
)
def test_help_is_a_manual(command, options):
    shown = command.make_parser().format_help()
    assert all(option in shown for option in options)
