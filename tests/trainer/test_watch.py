# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest

from tests.helpers import tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP
from trl_distreward.scripts.report import render_report
from trl_distreward.trainer.watch import parted


class Scripted:
    """A distance that takes given values."""

    higher_is_better = False

    def __init__(self, *values):
        self.values = iter(values)

    def reset(self):
        pass

    def update(self, images, conditions):
        pass

    def compute(self):
        return next(self.values)


FALLING = (8.0, 7.0, 6.0, 5.0, 4.0)


@pytest.mark.parametrize(
    ("heldout", "reward", "warns"),
    [
        ((1, 2, 3, 4), (8, 7, 6, 5), True),
        ((9, 1, 2, 3, 4), (1, 8, 7, 6, 5), True),  # the last evaluations count
        ((1, 2, 3), (8, 7, 6), False),  # too few
        ((1, 2, 2, 4), (8, 7, 6, 5), False),
        ((1, 2, 3, 4), (8, 7, 7.5, 5), False),
        ((1, 2, 3, 4, 5), (8, 7, 6, 5, 4), False),  # said at the evaluation before
    ],
)
def test_parting_needs_three_rises_while_the_reward_falls_and_is_said_once(heldout, reward, warns):
    values = zip(heldout, reward, strict=True)
    evaluations = [{"values": {"ode_judge": h, "ode_distance_a": r, "ode_distance_b": r}} for h, r in values]
    assert parted(evaluations, ["judge"]) == ["ode_judge"] * warns


def test_a_hacked_reward_is_seen_and_the_best_checkpoint_kept(tmp_path, caplog):
    heldout = Scripted(3.0, 1.5, 2.0, 2.5, 3.0)
    settings = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, **EVALUATE_EVERY_STEP}
    trainer = tiny_trainer(tmp_path, max_steps=5, eval_metrics={"judge": heldout}, eval_samplers=["ode"], **settings)
    trainer.eval_metrics["distance_features"] = Scripted(*FALLING)
    trainer.train()
    (warning,) = [line for line in caplog.messages if "reward hacking" in line]
    assert "eval_ode_judge rose at 3 evaluations in a row" in warning
    assert "eval_ode_judge is the best so far, 1.5" in caplog.text
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 1.5
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert "checkpoint-2" in kept and kept <= {"checkpoint-2", "checkpoint-5"}
    page = render_report(tmp_path)
    assert "Best by eval_ode_judge: checkpoint-2" in page and "Update 5: ode_judge rose at 3 evaluations" in page
    assert "ode_judge, held out" in page and "distances, relative to the first" in page


def test_other_choices_of_the_best_stay(tmp_path):
    def chosen(**settings):
        return tiny_trainer(tmp_path, eval_metrics={"judge": Scripted()}, **settings).args.metric_for_best_model

    assert chosen(metric_for_best_model="ode_distance_features", **EVALUATE_EVERY_STEP) == "ode_distance_features"
    assert chosen(**EVALUATE_EVERY_STEP) == "eval_sde_judge"


def test_evaluation_may_begin_when_a_run_is_resumed(tmp_path):
    settings = {"eval_metrics": {"judge": Scripted(2.0, 1.0)}, "eval_samplers": ["ode"], **SAVE_EVERY_STEP}
    tiny_trainer(tmp_path, max_steps=1, **settings).train()
    resumed = tiny_trainer(tmp_path, max_steps=3, **settings, **EVALUATE_EVERY_STEP)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 3
