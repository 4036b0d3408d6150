# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig

from tests.docs_pages import DOCS
from tests.helpers import tiny_pipeline, tiny_reward, tiny_trainer
from tests.runs import SAVE_EVERY_STEP, calls_of
from trl_distreward import PAPER, DiffusionDistributionConfig, DistributionRewardTrainer
from trl_distreward.trainer import dry_run as module
from trl_distreward.trainer.costs import Plan
from trl_distreward.trainer.dry_run import check_disk, dry_run

BACKPROP = {"loss_type": "backprop", "top_advantage_quantile": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.0},
        {"num_iterations": 2, "reference_refresh_steps": 1, "max_steps": 4},
        {"best_of_n": 2, "reference_update": "rolling", "selection": "top_bottom"},
        {"loss_type": "rft", "guidance_scale": 2.0, "condition_dropout": 0.0},
        {"loss_type": "nft", "guidance_scale": 2.0},
        {"loss_type": "transport", "num_iterations": 2},
        {"sde_window_size": 2, "selection": "all"},
        {"timestep_fraction": 0.5, "reward_funcs": tiny_reward(credit="leave_one_in"), "reference_refresh_steps": 1},
        {**BACKPROP, "backprop_from": 0.5},
        {**BACKPROP, "sampler": "ode", "last_step_size": 0},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_planned_network_evaluations_are_those_of_a_real_run(tmp_path, settings):
    pipeline, seen = tiny_pipeline(), Counter()  # images that the network sees without and with gradients
    pipeline.transformer.register_forward_pre_hook(lambda _, x: seen.update({torch.is_grad_enabled(): len(x[0])}))
    trainer = tiny_trainer(tmp_path, pipeline, **settings)
    plan, steps = Plan.of(trainer), trainer.args.max_steps
    trainer.train()
    rollouts = steps // trainer.args.num_iterations
    assert (
        seen[False]
        == (plan.counts["rollout"] + plan.counts["old policy"]) * rollouts + plan.counts["refresh"] * plan.refreshes
    )
    assert seen[True] == plan.counts["update"] * steps
    per_update = f"{seen.total() / steps:,.0f} network evaluations an update, {seen.total():,.0f} in all"
    assert per_update in plan.describe(trainer)
    seen.clear()
    trainer.evaluate()
    assert seen[False] == plan.counts["evaluation"]


def test_a_first_run_is_affordable(tmp_path):
    totals = []
    for settings in ({}, PAPER):
        args = DiffusionDistributionConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
        trainer = DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), args)
        totals += re.findall(r"update, ([\d,]+) in all", Plan.of(trainer).describe(trainer))
    assert totals == ["357,200", "190,530,000"]
    start = (DOCS / "start.md").read_text()
    assert all(f"{total} network evaluations" in start for total in totals)


def test_evaluations_and_checkpoints_are_counted_as_transformers_makes_them(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 0.4, "eval_on_start": True, "num_train_epochs": 3}
    trainer = tiny_trainer(tmp_path, max_steps=-1, **settings, save_strategy="epoch")
    plan = Plan.of(trainer)
    trainer.train()
    assert plan.steps == trainer.state.global_step == 6
    evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert plan.evaluations == len(evaluations)
    assert plan.checkpoints == len(list(tmp_path.glob("checkpoint-*"))) == 3


@pytest.mark.parametrize(
    "settings", [{"ema_decay": 0.9}, {"peft_config": LoraConfig(r=16)}, {"save_only_model": True}]
)
def test_predicted_checkpoint_has_the_size_of_a_real_one(tmp_path, settings):
    def trainer():
        pipeline = tiny_pipeline(hidden_size=128, num_layers=3)
        return tiny_trainer(tmp_path, pipeline, max_steps=1, **SAVE_EVERY_STEP, **settings)

    prediction = dry_run(trainer())
    trainer().train()
    real = sum(file.stat().st_size for file in (tmp_path / "checkpoint-1").rglob("*") if file.is_file())
    assert prediction.checkpoint == pytest.approx(real, rel=0.1)


def test_a_dry_run_predicts_every_phase_and_leaves_no_files(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, **SAVE_EVERY_STEP}
    trainer = tiny_trainer(tmp_path, max_steps=4, **settings)
    trainer.evaluate = None  # not called
    decoded = calls_of(trainer.policy, "decode")
    prediction = dry_run(trainer)
    assert sum(len(x) for (x,), _ in decoded) == 1 + 5 + 12  # counted; a batch of the reference set; a rollout
    assert len(trainer.rewards.of_sets[0].features["features"]) == 24
    assert prediction.fits and prediction.plan.steps == 4 and not list(tmp_path.iterdir())
    assert all(prediction.seconds[phase] > 0 for phase in ("rollout", "reward", "update", "refresh", "evaluation"))
    assert prediction.device_hours == pytest.approx(sum(prediction.seconds.values()) * 4 / 3600)
    printed = str(prediction)
    assert "4 updates on 1 x CPU" in printed and printed.endswith("fits")


@pytest.mark.parametrize(("part", "lower"), [("rollout", "rollout"), ("loss", "per_device_train")])
def test_a_phase_that_does_not_fit_in_memory_is_named_with_what_to_lower(tmp_path, part, lower):
    trainer = tiny_trainer(tmp_path, reference_refresh_steps=2)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    setattr(trainer.estimator, part, full)
    prediction = dry_run(trainer)
    assert not prediction.fits
    assert re.search(f"does not fit: .* runs out .* lower {lower}_batch_size", str(prediction))


def test_out_of_memory_names_the_phase_and_what_to_lower(tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for phase, lower in (("rollout", "rollout"), ("refresh", "per_device_eval"), ("evaluation", "per_device_eval")):
        trainer = tiny_trainer(tmp_path)
        owner, method, run = {
            "rollout": (trainer.estimator, "rollout", trainer.train),
            "refresh": (trainer.reference_set, "refresh", trainer.train),
            "evaluation": (trainer.eval_metrics["distance_features"], "update", trainer.evaluate),
        }[phase]
        setattr(owner, method, full)
        with pytest.raises(torch.OutOfMemoryError, match=f"^{phase} runs out of memory: lower {lower}_batch_size"):
            run()


def test_a_run_whose_checkpoints_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path / "not" / "there", ema_decay=0.9, **SAVE_EVERY_STEP)
    check_disk(trainer)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match="set save_total_limit, save_only_model=True"):
        check_disk(trainer)
    old = tmp_path / "not" / "there" / "checkpoint-5"
    old.mkdir(parents=True)
    (old / "optimizer.pt").write_bytes(bytes(5_000_000))
    check_disk(trainer)  # old checkpoints are replaced
