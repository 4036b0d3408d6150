# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiTPipeline, StableDiffusion3Pipeline
from PIL import Image
from trl import TrlParser

from tests.helpers import tiny_pipeline
from trl_distreward import PAPER, DiffusionDistributionConfig, as_policy, load_pipeline
from trl_distreward.scripts import train
from trl_distreward.trainer.costs import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = EXAMPLES / "configs"
RECIPES = sorted(path for family in ("sit", "dit", "sd3") for path in CONFIGS.glob(f"{family}_*.yaml"))


@pytest.fixture
def example(monkeypatch):
    """Imports examples by the names that recipes use."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def parsed(example, recipe, *options):
    arguments = train.TrainArguments if recipe.stem.startswith("sd3") else example("sit_imagenet").ImageNetArguments
    parser = TrlParser((arguments, DiffusionDistributionConfig))
    return parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "True", *options])


def launch(script, *options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [f"examples/{script}.py", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def logs(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def changed(first, second):
    """Names of the tensors in which two modules differ."""
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_evaluate_the_schedule_of_training(example, recipe):
    given = [] if "smoke" in recipe.stem else ["--real_statistics", "given.npz"]
    if recipe.stem == "sd3_medium_lora":
        given += ["--dataset_name", "given"]
        parsed(example, recipe, "--dataset_name", "given", "--real_images", "given", "--real_resize", "512")
    arguments, config = parsed(example, recipe, *given)
    assert arguments.feature_extractor or arguments.prompt_encoder
    schedules = config.eval_schedules
    assert config.metric_for_best_model.removeprefix("eval_").removesuffix("_distance_features") in schedules
    assert {schedule.sampler for schedule in schedules.values()} == {"sde", "ode"}
    assert config.num_inference_steps in {schedule.num_steps for schedule in schedules.values()}


@pytest.mark.parametrize("recipe", ["sit_xl_imagenet256", "dit_xl_imagenet256"])
def test_imagenet_recipes_have_the_papers_settings(example, recipe):
    _, config = parsed(example, CONFIGS / f"{recipe}.yaml", "--real_statistics", "given.npz")
    paper = DiffusionDistributionConfig(output_dir="x", use_cpu=True, **PAPER)
    for name in PAPER.keys() - {"num_inference_steps_eval"}:  # the recipes also evaluate the steps of training
        assert getattr(config, name) == getattr(paper, name), name
    policy = as_policy(tiny_pipeline())
    assert recipe.startswith("dit") or config.rollout_schedule.on(policy) == paper.rollout_schedule.on(policy)


def test_sit_loads_from_a_folder_and_from_an_original_checkpoint(example, tmp_path):
    load_model = example("sit_imagenet").load_model
    pipeline = load_model("random:S/8", "random")
    assert pipeline.decode(torch.zeros(1, 4, 32, 32)).shape == (1, 3, 256, 256)
    pipeline.save_pretrained(tmp_path / "sit")
    torch.save(pipeline.transformer.state_dict(), tmp_path / "original.pt")
    for name in ("sit", "original.pt"):
        assert not changed(load_model(str(tmp_path / name), "random").transformer, pipeline.transformer)


@pytest.mark.parametrize("option", ["--dry-run", None])
def test_cifar10_runs_tiny(example, tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    example("cifar10").main(["--tiny", *([option] if option else [])])
    printed = capsys.readouterr().out
    if option:
        assert "device-hours" in printed and not list(tmp_path.rglob("*.safetensors"))
        return
    assert re.search(r"eval_ode_judge: \d+\.\d+ -> \d+\.\d+", printed)
    assert (tmp_path / "outputs" / "cifar10" / "samples" / "step-2.png").is_file()
    assert DDPMPipeline.from_pretrained(tmp_path / "outputs" / "cifar10").unet.config.sample_size == 8


def test_cifar10_takes_the_network_evaluations_that_it_names(example, tmp_path, monkeypatch):
    """The real settings, with the tiny parts."""
    cifar10, found = example("cifar10"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(cifar10, "real_parts", cifar10.tiny_parts)
    monkeypatch.setattr(cifar10, "dry_run", lambda trainer: found.append((Plan.of(trainer), trainer)))
    cifar10.main(["--dry-run"])
    plan, trainer = found[0]
    assert "357,200 in all" in plan.describe(trainer) and "357,200 network evaluations" in cifar10.__doc__
    assert plan.counts["evaluation"] == 50_000


def test_the_demo_shows_before_after_curves_and_a_table(example, tmp_path):
    digits = example("digits")
    for index, name in enumerate(["before", *(f"after_{each}" for each in digits.ESTIMATORS)]):
        digits.save_grid(torch.full((100, 1, 8, 8), 40 * index, dtype=torch.uint8), tmp_path / f"{name}.png")
    before, after = ({name: {"mean": mean, "std": 0.1} for name in digits.METRICS} for mean in (0.8, 0.6))
    curve = [{"step": step, "values": {"ode_distance_last": 9 - step, "ode_heldout": 8 - step}} for step in range(3)]
    report = {"base": before, "floor": before, "evaluations": dict.fromkeys(digits.ESTIMATORS, curve)}
    report |= dict.fromkeys(digits.ESTIMATORS, after)
    assert digits.report_table(report).count("-25.0%") == len(digits.METRICS) * len(digits.ESTIMATORS)
    shown = Image.open(digits.draw_overview(tmp_path, report)).convert("RGB")
    found = {grey for _, (grey, *rest) in shown.getcolors(2**24) if rest == [grey, grey]}
    assert {0, 40, 80} <= found  # the three grids


@pytest.mark.slow
def test_sit_smoke_recipe_runs_with_accelerate_and_resumes(tmp_path):
    options = ["sit_imagenet", "--config", "examples/configs/sit_s_smoke.yaml", "--output_dir", tmp_path]
    assert "device-hours" in launch(*options, "--dry-run") and not list(tmp_path.glob("checkpoint-*"))
    launch(*options)
    assert load_pipeline(tmp_path).transformer.config.patch_size == 8
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{i}.png" for i in range(3)}
    history = logs(tmp_path, 2)
    evaluated = {key for entry in history for key in entry if key.endswith("distance_features")}
    assert {f"eval_{sampler}_{steps}_distance_features" for sampler in ("sde", "ode") for steps in (2, 4)} <= evaluated
    best = min(entry["eval_sde_4_distance_features"] for entry in history if "eval_runtime" in entry)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == best
    launch(*options, "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert (tmp_path / "checkpoint-3" / "model_index.json").is_file()


def test_dit_smoke_recipe_writes_a_diffusers_pipeline_and_resumes(example, tmp_path, capsys):
    options = ["--config", str(CONFIGS / "dit_smoke.yaml"), "--output_dir", str(tmp_path)]
    launch("sit_imagenet", *options)
    values = [value for entry in logs(tmp_path, 2) for key, value in entry.items() if key.startswith("eval_")]
    assert len(values) == 2 * (4 + 2) and all(math.isfinite(value) for value in values)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{i}.png" for i in range(3)}

    imagenet = example("sit_imagenet")
    saved, start = DiTPipeline.from_pretrained(tmp_path), imagenet.load_model("random:dit", "random")
    assert saved.get_label_ids(["class 7", "class 999"]) == [7, 999]
    images = saved([7, 999], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape == (2, 64, 64, 3) and images.std() > 0.01
    assert not changed(saved.vae, start.vae) and len(changed(saved.transformer, start.transformer)) > 20

    imagenet.main([*options, "--resume_from_checkpoint", "true", "--max_steps", "3"])
    assert [entry["step"] for entry in logs(tmp_path, 3) if "loss" in entry] == [1, 2, 3]
    imagenet.main([*options, "--dry-run"])
    assert "device-hours" in capsys.readouterr().out


def test_sd3_smoke_recipe_writes_an_adapter_that_diffusers_loads_and_resumes(example, tmp_path):
    example("tiny_sd3").make_parts(parts := tmp_path / "parts")
    recipe = (CONFIGS / "sd3_smoke.yaml").read_text().replace("outputs/tiny-sd3", str(parts))
    (tmp_path / "recipe.yaml").write_text(recipe)
    options = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)]
    train.main(options)
    evaluations = [entry for entry in logs(tmp_path, 2) if "eval_runtime" in entry]
    names = {f"eval_{sampler}_{name}" for sampler in ("sde", "ode") for name in ("distance_features", "pick_score")}
    assert len(evaluations) == 2 and all(math.isfinite(entry[name]) for entry in evaluations for name in names)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{i}.png" for i in range(3)}

    start, merged, adapted = (
        StableDiffusion3Pipeline.from_pretrained(folder)
        for folder in (parts / "pipeline", tmp_path, parts / "pipeline")
    )
    frozen = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert not any(changed(getattr(start, part), getattr(merged, part)) for part in frozen)
    moved = changed(start.transformer, merged.transformer)
    assert len(moved) == 2 * 4 and all(".attn.to_" in name for name in moved)
    adapted.load_lora_weights(str(tmp_path), subfolder="adapter", weight_name="pytorch_lora_weights.safetensors")

    def images(pipeline):
        noise = torch.Generator().manual_seed(0)
        return pipeline("a red cat", num_inference_steps=4, output_type="pt", generator=noise).images

    made = images(merged)
    torch.testing.assert_close(images(adapted), made, rtol=0, atol=1e-5)
    assert made.shape == (1, 3, 16, 16) and (made - images(start)).abs().max() > 1e-4

    train.main([*options, "--resume_from_checkpoint", "true", "--max_steps", "3"])
    assert [entry["step"] for entry in logs(tmp_path, 3) if "loss" in entry] == [1, 2, 3]
