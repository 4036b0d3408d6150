# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Evaluation, the best model, the average of the weights, the model card and the record of a run."""

import json
import math

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from tests.helpers import features, real_images, tiny_merge_trainer, tiny_trainer, trained
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights, logged, weights
from trl_distreward import FeatureDistance, FeatureStatistics, load_pipeline
from trl_distreward.generation import generate_images


def test_evaluation_reports_every_sampler_and_repeats(tmp_path):
    real = FeatureStatistics.from_features(real_images().flatten(1).float())
    extra = {"pixels": FeatureDistance(lambda x: x.flatten(1).float(), real)}
    trainer = tiny_trainer(tmp_path, eval_metrics=extra, num_eval_images=33)
    first, again, other = trainer.evaluate(), trainer.evaluate(), trainer.evaluate(seed=7)
    for key in [f"eval_{s}_{m}" for s in ("sde", "ode") for m in ("distance_features", "pixels")]:
        assert math.isfinite(first[key]) and first[key] == again[key] != other[key]
    # the same numbers, by hand
    metric = FeatureDistance(features, FeatureStatistics.from_features(features(real_images())))
    schedule = trainer.args.eval_schedules["ode"]
    batches = generate_images(trainer.policy, trainer.eval_sets[""], schedule, batch_size=8, stream="evaluation")
    for images, _ in batches:
        metric.update(images)
    assert metric.compute() == pytest.approx(first["eval_ode_distance_features"], rel=1e-5)


def test_the_best_checkpoint_is_loaded_at_the_end_and_the_card_describes_it(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ode_distance_features"}
    trainer = trained(tmp_path, max_steps=4, learning_rate=5e-2, **EVALUATE_EVERY_STEP, **SAVE_EVERY_STEP, **best)
    distances = logged(trainer, "eval_ode_distance_features")
    assert trainer.state.best_metric == min(distances)
    step = trainer.state.best_global_step
    assert step < 4
    assert_same_weights(load_pipeline(trainer.state.best_model_checkpoint).transformer, trainer.network)
    for _ in range(2):  # before and after another evaluation of the best model
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "README.md")
        values = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert values["ode_distance_features"] == pytest.approx(min(distances), rel=1e-6)
        assert f" {step} updates" in card.text and f"| step {step} |" in card.text
        assert trainer.evaluate()["eval_ode_distance_features"] == pytest.approx(min(distances), rel=1e-6)
        trainer.evaluate(seed=7)


@pytest.mark.parametrize("kind", [tiny_trainer, tiny_merge_trainer])
def test_an_evaluation_of_the_best_model_is_recorded_at_its_step(tmp_path, kind):
    best = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True, "eval_samplers": ["ode"]}
    trainer = kind(
        tmp_path, eval_metrics={"rising": Rising()}, max_steps=2, **EVALUATE_EVERY_STEP, **SAVE_EVERY_STEP, **best
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(seed=7)  # another seed's is not comparable
    found = json.loads((tmp_path / "run.json").read_text())["evaluations"]
    assert [(e["step"], e["values"]["ode_rising"]) for e in found] == [(1, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("kind", [tiny_trainer, tiny_merge_trainer])
def test_a_dictionary_of_datasets_is_evaluated_by_name(tmp_path, kind):
    datasets = {name: Dataset.from_dict({"label": [label] * 3}) for name, label in (("cats", 0), ("dogs", 1))}
    best = {"metric_for_best_model": "dogs_ode_distance_features", "load_best_model_at_end": True}
    settings = {"max_steps": 2, "num_eval_images": 20, **EVALUATE_EVERY_STEP, **SAVE_EVERY_STEP}
    trainer = kind(tmp_path / "run", eval_dataset=datasets, **settings, **best)
    trainer.train()
    values = trainer.evaluate()
    assert trainer.state.best_metric == min(logged(trainer, "eval_dogs_ode_distance_features")[:2])
    assert values["eval_dogs_ode_distance_features"] != values["eval_cats_ode_distance_features"]
    alone = kind(tmp_path / "alone", eval_dataset=datasets["cats"], num_eval_images=20).evaluate()
    before = logged(trainer, "eval_cats_ode_distance_features")
    again = trainer.evaluate(eval_dataset=datasets["cats"], metric_key_prefix="eval")
    assert again["eval_ode_distance_features"] == values["eval_cats_ode_distance_features"] in before
    assert alone.keys() == again.keys()
    with pytest.raises(ValueError, match="choose one of eval_cats_"):
        kind(tmp_path, eval_dataset=datasets, **{**settings, **best, "metric_for_best_model": "ode_distance_features"})


def test_evaluations_of_given_coefficients_are_not_recorded_as_those_of_the_run(tmp_path):
    trainer = tiny_merge_trainer(tmp_path)
    trainer.evaluate(coefficients=[0.0, 0.0, 0.0, 1.0])
    assert trainer.run_record.evaluations == []
    trainer.evaluate()
    assert len(trainer.run_record.evaluations) == 1


def test_the_average_is_evaluated_and_saved_and_the_trained_weights_come_back(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", max_steps=3, ema_decay=0.5, learning_rate=1e-2)
    history = []

    update = trainer.ema.update
    trainer.ema.update = lambda network, step: history.append(weights(network)) or update(network, step)
    trainer.train()
    name = "blocks.1.mlp.fc2.weight"
    # each update's weights count half of the next one's; those before the first do not count
    average = (history[0][name] + 2 * history[1][name] + 4 * history[2][name]) / 7
    trainer.save_model(str(tmp_path / "out"))
    saved = load_pipeline(tmp_path / "out").transformer
    torch.testing.assert_close(dict(saved.named_parameters())[name], average, atol=1e-6, rtol=1e-5)
    assert torch.equal(weights(trainer.network)[name], history[-1][name])
    with pytest.raises(RuntimeError, match="inside"), trainer.evaluation_weights():
        torch.testing.assert_close(weights(trainer.network)[name], average, atol=1e-6, rtol=1e-5)
        raise RuntimeError("inside")
    assert torch.equal(weights(trainer.network)[name], history[-1][name])


def test_the_model_card_has_the_settings_and_the_change(tmp_path):
    trainer = trained(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.create_model_card(model_name="tiny", tags="mine", license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("diffusers", "apache-2.0")
    assert {"mine", "distribution-reward"} <= set(card.data.tags)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = logged(trainer, "eval_ode_distance_features")[-1]
    assert results["ode_distance_features"] == pytest.approx(last, abs=1e-6)
    assert "2607.02291" in card.text and "| ode_distance_features |" in card.text and "step 0 | step 2" in card.text
    assert "| `replace_size` | `2` |" in card.text and "| `learning_rate` | `0.001` |" in card.text


def test_an_evaluation_with_another_prefix_is_not_a_log_of_training(tmp_path):
    class Test(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.evaluate(metric_key_prefix="test")

    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.add_callback(Test())
    trainer.train()
    (tested,) = (entry for entry in trainer.state.log_history if "test_runtime" in entry)
    assert not {"reward", "num_images"} & set(tested)
    assert len(logged(trainer, "reward")) == 1 and trainer.run_record.evaluations == []


def test_training_again_forgets_the_first_run(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert [e["step"] for e in trainer.run_record.evaluations] == [0, 1]
    trainer.train()
    assert trainer.num_images == 24 + 12
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["images"] == {"refresh": 24, "rollout": 12} and set(run["seconds"]) >= {
        "refresh",
        "rollout",
        "training",
    }
    assert [e["step"] for e in run["evaluations"]] == []


def test_a_run_survives_a_record_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "run.json").mkdir()
    trainer = trained(tmp_path)
    assert trainer.state.global_step == 1 and "run.json could not be written" in caplog.text


def test_a_log_of_several_steps_has_sums_extremes_and_means(tmp_path):
    every, few = (
        trained(tmp_path, max_steps=4, num_iterations=2, epsilon=0.2, logging_steps=steps) for steps in (1, 4)
    )
    for key, reduce in {"ratio/min": min, "ratio/max": max, "reward": lambda v: sum(v) / len(v)}.items():
        assert logged(few, key)[0] == reduce(logged(every, key))
    assert logged(few, "num_images")[0] == logged(every, "num_images")[3] == 24 + 2 * 12
    equal = trained(tmp_path, max_steps=3, logging_steps=3, reward_funcs=lambda images, **kwargs: [0.0] * len(images))
    assert logged(equal, "skipped_updates") == [3.0]
