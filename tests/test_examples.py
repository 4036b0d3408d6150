# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from trl import TrlParser

from trl_distreward import DiffusionDistributionConfig, FeatureStatistics, load_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "configs").glob("sit_*.yaml"))


@pytest.fixture
def example(monkeypatch):
    """The example as a module, importable by the name that its recipes know."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("sit_imagenet")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_nothing_that_the_options_do_not_know(example, recipe, tmp_path):
    parser = TrlParser((example.SiTImageNetArguments, DiffusionDistributionConfig))
    arguments, config = parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "True"])
    assert arguments.feature_extractor and config.metric_for_best_model.removeprefix("eval_").startswith("sde")
    counts = {schedule.num_steps for schedule in config.eval_schedules.values()}
    assert len(config.eval_schedules) == 4 and config.num_inference_steps in counts


def test_the_recipe_is_the_papers(example):
    parser = TrlParser((example.SiTImageNetArguments, DiffusionDistributionConfig))
    recipe = str(EXAMPLES / "configs" / "sit_xl_imagenet256.yaml")
    _, config = parser.parse_args_and_config(["--config", recipe, "--use_cpu", "True"])
    paper = DiffusionDistributionConfig(output_dir="x", use_cpu=True)
    for name in ("reference_set_size", "num_subsets", "replace_size", "reference_refresh_steps", "learning_rate"):
        assert getattr(config, name) == getattr(paper, name), name
    for name in ("rollout_schedule", "epsilon", "beta", "top_advantage_quantile", "max_steps", "adam_beta2"):
        assert getattr(config, name) == getattr(paper, name), name


def test_models_and_real_data_are_found_by_what_they_are_called(example, tmp_path, monkeypatch):
    pipeline = example.load_sit("random:S/8", "random")
    assert pipeline.decode(torch.zeros(1, 4, 32, 32)).shape == (1, 3, 256, 256)
    pipeline.save_pretrained(tmp_path / "sit")
    loaded = example.load_sit(str(tmp_path / "sit"), "random")
    torch.save(pipeline.transformer.state_dict(), tmp_path / "original.pt")
    converted = example.load_sit(str(tmp_path / "original.pt"), "random")
    x, t, label = torch.randn(1, 4, 32, 32), torch.tensor([0.3]), torch.tensor([7])
    with torch.no_grad():
        velocities = [p.transformer.eval()(x, t, label).sample for p in (pipeline, loaded, converted)]
    assert torch.equal(velocities[0], velocities[1]) and torch.equal(velocities[0], velocities[2])

    config = DiffusionDistributionConfig(output_dir=str(tmp_path), use_cpu=True)
    arguments = example.SiTImageNetArguments(feature_extractor="inception", real_statistics="given.npz")
    assert example.real_statistics(arguments, config, pipeline) == "given.npz"
    arguments = example.SiTImageNetArguments(feature_extractor="sit_imagenet.thumbnails", real_images="generated")
    monkeypatch.setattr(example, "NUM_GENERATED", 4)
    statistics = example.real_statistics(arguments, config, pipeline)
    assert isinstance(statistics, FeatureStatistics) and (statistics.count, statistics.dimension) == (4, 48)


def test_statistics_of_real_images_are_computed_once(example, tmp_path):
    for i in range(3):
        Image.effect_noise((300, 260), 50 + i).convert("RGB").save(tmp_path / f"{i}.png")
    config = DiffusionDistributionConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    arguments = example.SiTImageNetArguments(feature_extractor="sit_imagenet.thumbnails", real_images=str(tmp_path))
    path = example.real_statistics(arguments, config, None)
    assert FeatureStatistics.load(path).count == 3
    written = Path(path).stat().st_mtime_ns
    assert example.real_statistics(arguments, config, None) == path
    assert Path(path).stat().st_mtime_ns == written


@pytest.mark.slow
def test_smoke_recipe_runs_through_accelerate_and_resumes(tmp_path):
    options = ["--config", "examples/configs/sit_s_smoke.yaml", "--output_dir", str(tmp_path)]

    def launch(*more):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        result = subprocess.run(
            [*command, "examples/sit_imagenet.py", *options, *more],
            capture_output=True,
            text=True,
            cwd=EXAMPLES.parent,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    assert "device-hours" in launch("--dry-run") and not list(tmp_path.glob("checkpoint-*"))
    launch()
    assert load_pipeline(tmp_path).transformer.config.patch_size == 8
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{i}.png" for i in range(3)}
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    evaluated = {key for entry in state["log_history"] for key in entry if key.endswith("distance_features")}
    assert {f"eval_{sampler}_{steps}_distance_features" for sampler in ("sde", "ode") for steps in (2, 4)} <= evaluated
    best = min(entry["eval_sde_4_distance_features"] for entry in state["log_history"] if "eval_runtime" in entry)
    assert state["best_metric"] == best
    launch("--resume_from_checkpoint", "true", "--max_steps", "3")
    assert (tmp_path / "checkpoint-3" / "model_index.json").is_file()
