# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import logging

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers import tiny_config, tiny_merge_trainer, tiny_trainer
from trl_distreward import DiffusionDistributionConfig, MergeCoefficientConfig
from trl_distreward.trainer import checkpoints
from trl_distreward.trainer.run_record import RunRecord, describe_config


@pytest.mark.parametrize("kind", [DiffusionDistributionConfig, MergeCoefficientConfig])
def test_only_what_was_chosen_differs_from_the_defaults(tmp_path, kind):
    assert set(describe_config(kind(output_dir=str(tmp_path), use_cpu=True))["defaults"]) == {"use_cpu"}
    chosen = {"lr_scheduler_kwargs": {"num_cycles": 2}, "report_to": "tensorboard", "save_strategy": "no", "seed": 7}
    described = describe_config(kind(output_dir=str(tmp_path), use_cpu=True, **chosen))
    assert set(described["defaults"]) == {"use_cpu", *chosen} and described["defaults"]["seed"] == 42
    whole = kind(output_dir=str(tmp_path), use_cpu=True, logging_steps=1.0, weight_decay=0)
    assert set(describe_config(whole)["defaults"]) == {"use_cpu"}


def test_every_setting_is_in_one_group_and_own_ones_in_those_of_the_docstring(tmp_path):
    described = describe_config(tiny_config(tmp_path))
    grouped = [name for names in described["groups"].values() for name in names]
    assert sorted(grouped) == sorted(described["values"])
    assert "replace_size" in described["groups"]["the reward"] and "beta" in described["groups"]["the update"]
    assert "weight_decay" in list(described["groups"].values())[-1]


def test_evaluation_under_another_prefix_is_no_log_of_training(tmp_path):
    class Test(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.evaluate(metric_key_prefix="test")

    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.add_callback(Test())
    trainer.train()
    tested = [entry for entry in trainer.state.log_history if "test_runtime" in entry]
    assert len(tested) == 1 and not {"reward", "num_images"} & set(tested[0])
    logs = json.loads((tmp_path / "run.json").read_text())["log_history"]
    assert "reward" in logs[0] and not any(name.startswith("test_") for entry in logs for name in entry)


def test_training_again_forgets_the_first_run(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert [e["step"] for e in trainer.run_record.evaluations] == [0, 1]
    trainer.train()
    assert trainer.run_record.evaluations == [] and trainer.num_images == 24 + 12
    assert json.loads((tmp_path / "run.json").read_text())["images"] == {"refresh": 24, "rollout": 12}


def test_nested_running_is_counted_once_and_a_resumed_total_goes_on():
    record = RunRecord()
    with record.running():
        with record.running():
            pass
        inside = record.total_seconds
        record.load_state_dict({**record.state_dict(), "total_seconds": 100.0})
        assert 100 <= record.total_seconds < 100 + inside + 60
    assert record.total_seconds >= 100 and record.total_seconds == record.total_seconds


def test_run_outlives_a_record_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, max_steps=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "written_whole", full)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 1 and not (tmp_path / "run.json").exists()
    assert "run.json could not be written" in caplog.text


class Rising:
    """A metric that is worse at each evaluation."""

    count = 0

    def reset(self):
        pass

    def update(self, images, conditions):
        pass

    def compute(self):
        self.count += 1
        return float(self.count)


@pytest.mark.parametrize("kind", [tiny_trainer, tiny_merge_trainer])
def test_evaluation_of_the_best_model_is_not_that_of_the_last_update(tmp_path, kind):
    every = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True}
    trainer = kind(tmp_path, eval_metrics={"rising": Rising()}, eval_samplers=["ode"], **every, **best)
    trainer.train()
    trainer.evaluate()
    found = json.loads((tmp_path / "run.json").read_text())["evaluations"]
    assert [(e["step"], e.get("of")) for e in found] == [(1, None), (2, None), (2, "the best model, of update 1")]


def test_merge_without_differences_of_reward_is_a_skipped_update(tmp_path):
    trainer = tiny_merge_trainer(tmp_path, method="emanet", max_steps=2)
    trainer.judge.judge = lambda candidates, step: torch.zeros(len(candidates), 1, dtype=torch.float64)
    trainer.train()
    skipped = [{"step": step, "reason": "all rewards are equal"} for step in (0, 1)]
    assert json.loads((tmp_path / "run.json").read_text())["skipped"] == skipped


def test_merge_resumed_from_a_state_without_a_record_keeps_its_count_of_images(tmp_path):
    trainer = tiny_merge_trainer(tmp_path)
    state = trainer.training_state() | {"num_images": 120}
    del state["run_record"]
    trainer.load_training_state(state)
    assert trainer.num_images == 120
