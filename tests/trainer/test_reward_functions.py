# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What reward functions are called with, what they may return, and what is refused before work is done."""

import asyncio
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from tests.helpers import (
    features,
    real_images,
    tiny_config,
    tiny_merge_trainer,
    tiny_pipeline,
    tiny_reward,
    tiny_trainer,
    trained,
)
from tests.policies_parts import ddim
from tests.policies_tiny import stable_diffusion
from tests.runs import logged
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, SubsetReplaceReward
from trl_distreward.trainer.estimators import ESTIMATORS

ROWS = {"label": [0, 1, 2, 2, 1], "name": ["a", "b", "c", "d", "e"], "weight": [0.0, 1.0, 2.0, 3.0, 4.0]}


def brightness(images, **kwargs):
    return images.float().mean(dim=(1, 2, 3))


def recorder(calls):
    def recording(**kwargs):
        calls.append(kwargs | {"step": kwargs["trainer_state"].global_step})
        return brightness(kwargs["images"])

    return recording


def text_trainer(output_dir, function, rows, **kwargs):
    settings = {"time_grid": "auto", "last_step_size": 0, "num_inference_steps": 2, "num_inference_steps_eval": 2}
    return DistributionRewardTrainer(
        stable_diffusion(ddim()), function, tiny_config(output_dir, **settings), train_dataset=Dataset.from_dict(rows)
    )


# ---- arguments ----


@pytest.mark.parametrize("loss_type", ESTIMATORS)
@pytest.mark.parametrize("settings", [{}, {"stratify_by": "name", "replace_size": 3}])
def test_a_function_gets_the_dataset_rows_of_its_images(tmp_path, loss_type, settings):
    calls, dataset = [], Dataset.from_dict(ROWS)
    args = tiny_config(tmp_path, loss_type=loss_type, **settings)
    trainer = DistributionRewardTrainer(tiny_pipeline(), recorder(calls), args, train_dataset=dataset)
    trainer.train()
    assert len(calls) > 2
    names = ["images", "labels", "slots", "name", "weight", "trainer_state", "log_metric", "log_extra"]
    for call in calls:
        assert list(call) == [*names, "step"]
        assert call["labels"].dtype == torch.long
        assert call["weight"] == [float("abcde".index(name)) for name in call["name"]]
        assert call["labels"].tolist() == [ROWS["label"]["abcde".index(name)] for name in call["name"]]
        assert torch.equal(call["labels"], trainer.conditions[call["slots"]])
    assert {name for call in calls for name in call["name"]} == set("abcde")
    scored = [call for call in calls if not call["images"].requires_grad]
    assert all(call["images"].dtype == torch.uint8 for call in scored)
    compared = loss_type in ("transport", "backprop")  # with the values of float32 images
    assert [call["step"] for call in scored] == [0, 0, *[0] * compared, 1]


def with_pictures():
    """A dataset of labels, names and pictures, each as bright as its row says."""
    pictures = [np.full((4, 4), 10 * row, dtype=np.uint8) for row in range(5)]
    columns = Features({"label": Value("int64"), "name": Value("string"), "picture": Image()})
    return Dataset.from_dict({**{k: ROWS[k] for k in ("label", "name")}, "picture": pictures}, features=columns)


FORMS = {
    "mapped": lambda data: data.map(lambda row: {"label": row["label"]}),
    "pandas": lambda data: data.with_format("pandas"),
    "arrow": lambda data: data.with_format("arrow"),
    "numpy": lambda data: data.with_format("numpy"),
    "list": list,
    "stream": lambda data: data.to_iterable_dataset(num_shards=2),
    "formatted stream": lambda data: data.to_iterable_dataset().map(lambda row: row).with_format("pandas"),
    "endless stream": lambda data: data.repeat(5).to_iterable_dataset().repeat(None),
}


@pytest.mark.parametrize("form", FORMS)
def test_datasets_of_any_form_train_and_evaluate_alike(tmp_path, form):
    calls, rows = [], ROWS["label"]
    reward, settings = recorder(calls), {"reference_set_size": 25, "max_steps": 1}
    datasets = {"train_dataset": FORMS[form](with_pictures()), "eval_dataset": {"a": FORMS[form](with_pictures())}}
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **datasets, **settings)
    trainer.train()
    for call in calls:
        numbers = ["abcde".index(name) for name in call["name"]]
        assert all(isinstance(name, str) for name in call["name"])
        assert call["labels"].tolist() == [rows[number] for number in numbers]
        assert [np.asarray(picture).max() for picture in call["picture"]] == [10 * number for number in numbers]
    assert sorted(trainer.conditions.tolist()) == sorted(5 * rows)
    assert sorted(trainer.eval_sets["a_"].tolist()) == sorted(5 * rows)
    if form != "endless stream":  # whose rows are dealt in other rounds
        plain = tiny_trainer(tmp_path, reward_funcs=reward, train_dataset=with_pictures(), **settings)
        assert torch.equal(trainer.conditions, plain.conditions)
    metrics = trainer.evaluate(FORMS[form](with_pictures()))
    assert metrics["eval_samples_per_second"] > 0


def test_a_text_model_passes_prompts(tmp_path):
    calls = []
    text_trainer(tmp_path, recorder(calls), {"prompt": ["a cat", "a dog"], "points": [1, 2]}).train()
    assert len(calls) == 3
    for call in calls:
        assert "labels" not in call
        assert call["points"] == [1 if prompt == "a cat" else 2 for prompt in call["prompts"]]


def test_candidates_are_judged_with_the_rows_of_their_images(tmp_path):
    calls, dataset = [], Dataset.from_dict(ROWS)
    trainer = tiny_merge_trainer(
        tmp_path, reward_funcs=recorder(calls), train_dataset=dataset, scale_set_size=30, max_steps=1
    )
    trainer.train()
    calls = calls[1:]
    assert sum(len(call["images"]) for call in calls) == 5 * 20 + 4 * 20  # candidates, and merges at the end
    for call in calls:
        assert call["labels"].tolist() == [ROWS["label"]["abcde".index(name)] for name in call["name"]]
        assert torch.equal(call["labels"], trainer.conditions[call["slots"]])


@pytest.mark.parametrize("column", ["images", "slots", "prompts", "trainer_state", "log_metric", "log_extra"])
def test_columns_named_like_an_argument_are_refused(tmp_path, column):
    dataset = Dataset.from_dict({"class_labels": [0, 1], column: [0, 0]})
    args = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=f"column '{column}'.*rename_column"):
        DistributionRewardTrainer(tiny_pipeline(), brightness, args, train_dataset=dataset)
    DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), args, train_dataset=dataset)  # which is not called
    with pytest.raises(ValueError, match="column 'labels'.*rename_column"):
        text_trainer(tmp_path, brightness, {"prompt": ["a", "b"], "labels": [0, 1]})


def test_logged_values_are_averaged_over_calls_and_extra_columns_kept(tmp_path):
    def logs(images, log_metric, log_extra, trainer_state, **kwargs):
        scores = brightness(images)
        for score in scores.tolist():
            log_metric("bright", score)
        log_extra("step", [trainer_state.global_step] * len(images))
        return scores

    for loss_type in ESTIMATORS:
        trainer = trained(tmp_path, reward_funcs=logs, max_steps=2, loss_type=loss_type)
        assert logged(trainer, "bright") == pytest.approx(logged(trainer, "reward"))
        assert trainer.rewards.extra_columns == {"step": [1] * 12}
    merged = tiny_merge_trainer(tmp_path, reward_funcs=logs)
    merged.train()
    assert logged(merged, "bright") == pytest.approx(logged(merged, "reward"))


# ---- values ----


@pytest.mark.parametrize(
    "convert",
    [list, np.asarray, lambda values: values[:, None], lambda values: values.tolist(), lambda values: values.half()],
)
def test_functions_return_lists_arrays_or_tensors(tmp_path, convert):
    def whole(images, **kwargs):
        return brightness(images).round()

    expected = logged(trained(tmp_path, reward_funcs=whole), "reward")
    assert logged(trained(tmp_path, reward_funcs=lambda images, **_: convert(whole(images))), "reward") == expected


def test_a_function_that_abstains_does_not_count_for_these_images(tmp_path):
    def first(images, labels, **kwargs):
        return [2.0 if label == 0 else None for label in labels]

    def others(images, labels, **kwargs):
        return [None if label == 0 else float(label) for label in labels]

    weights = [1.0, 0.5]
    trainer = tiny_trainer(tmp_path, reward_funcs=[first, others], reward_weights=weights, num_subsets=12)
    rollout = trainer.rollout(trainer.model)
    scores = trainer.score(rollout)
    labels = trainer.conditions[rollout.slots]
    assert torch.equal(scores[0].isnan(), labels != 0) and torch.equal(scores[1].isnan(), labels == 0)
    expected = torch.where(labels == 0, 2.0, 0.5 * labels).double()
    torch.testing.assert_close(trainer.rewards.total(scores), expected)
    assert trainer._metrics["reward"] == [pytest.approx(expected.mean().item())]
    assert trainer._metrics["rewards/first/mean"] == [2.0]
    assert trainer.estimator.compute_advantages(scores).isfinite().all()
    trainer.train()
    assert not logged(trainer, "skipped_updates")


def test_candidates_mean_only_over_scored_images(tmp_path):
    def ones(images, labels, **kwargs):
        return [None if label == 0 else 1.0 for label in labels]

    trainer = tiny_merge_trainer(tmp_path, reward_funcs=[tiny_reward(), ones], max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/ones/mean") == [1.0]


def test_an_image_without_any_reward_is_named(tmp_path):
    def picky(images, labels, **kwargs):
        return [None if label == 1 else 1.0 for label in labels]

    with pytest.raises(ValueError, match=r"returned None for the image of slot \d+, 1: let one"):
        tiny_trainer(tmp_path, reward_funcs=[picky, picky]).train()
    with pytest.raises(ValueError, match=r"returned None for the image of slot \d+, 1: let one"):
        tiny_merge_trainer(tmp_path, reward_funcs=picky).train()
    tiny_trainer(tmp_path, reward_funcs=[picky, tiny_reward()]).train()  # every image has a distance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_a_fault_and_no_abstention(tmp_path, value):
    def broken(images, trainer_state, **kwargs):
        return [value if trainer_state.global_step == 1 else 1.0] * len(images)

    trainer = trained(tmp_path, reward_funcs=[tiny_reward(), broken], max_steps=3)
    assert logged(trainer, "skipped_updates") == [1.0]


def test_async_functions_run_together_and_within_a_running_loop(tmp_path):
    both, modes = asyncio.Barrier(2), []

    def meeting(name):
        async def score(images, **kwargs):
            await asyncio.wait_for(both.wait(), 20)  # for the other, which must have started
            modes.append(torch.is_grad_enabled())
            return brightness(images).tolist()

        return score

    class Judge:
        async def __call__(self, images, points, **kwargs):
            return await meeting("judge")(images)

    async def notebook():
        return trained(tmp_path, reward_funcs=[meeting("a"), partial(Judge(), points=1), brightness])

    trainer = asyncio.run(notebook())
    means = [logged(trainer, f"rewards/{name}/mean") for name in ("score", "Judge", "brightness")]
    assert means[0] == means[1] == means[2]
    assert not any(modes)


# ---- refused at construction ----


def wrong_signature(images):
    return brightness(images)


def returns_a_sentence(images, **kwargs):
    return "good"


def returns_too_few(images, **kwargs):
    return brightness(images)[:1]


def returns_images(images, **kwargs):
    return images


def returns_words(images, **kwargs):
    return ["good"] * len(images)


async def returns_nothing(images, **kwargs):
    pass


def returns_nan(images, **kwargs):
    return brightness(images) * torch.nan


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returns_a_sentence, "'returns_a_sentence' returned .* for 2 images: return one number per image"),
        (returns_too_few, "'returns_too_few' returned 1 values for 2 images"),
        (returns_images, "'returns_images' returned 32 values for 2 images"),
        (returns_words, "'returns_words' returned 2 values for 2 images: return one number"),
        (returns_nothing, "'returns_nothing' returned a NoneType for 2 images"),
        (returns_nan, "'returns_nan' returned NaN or infinity"),
        ("fid", "'fid': pass a SubsetReplaceReward"),
        (SubsetReplaceReward, "class .*SubsetReplaceReward.*: pass a SubsetReplaceReward"),
        (real_images(4), "tensor.*: pass a SubsetReplaceReward"),
        ([], "None: pass a SubsetReplaceReward"),
        ([tiny_reward(), "fid"], "'fid': pass a SubsetReplaceReward"),
    ],
)
@pytest.mark.parametrize("build", [tiny_trainer, tiny_merge_trainer])
def test_misfits_are_refused_before_an_image_is_generated(tmp_path, build, function, message):
    model = tiny_pipeline()
    model.transformer.forward = None
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build(tmp_path, reward_funcs=function)


def test_a_wrong_signature_is_told_the_arguments(tmp_path):
    with pytest.raises(TypeError) as caught:
        tiny_trainer(tmp_path, reward_funcs=wrong_signature)
    (note,) = caught.value.__notes__
    assert "'wrong_signature' is called with the keyword arguments images, labels, slots, trainer_state" in note
    assert "**kwargs" in note


def test_functions_are_tried_as_in_the_first_update(tmp_path):
    def scheduled(images, trainer_state, **kwargs):
        progress = trainer_state.global_step / trainer_state.max_steps + trainer_state.epoch
        return brightness(images) * (1 + progress)

    for loss_type in ESTIMATORS:
        tiny_trainer(tmp_path, reward_funcs=scheduled, loss_type=loss_type)


# ---- rewards that teach nothing ----


def constant(images, **kwargs):
    return [0.1] * len(images)


def ordered(images, **kwargs):
    return list(range(len(images)))


@pytest.mark.parametrize(
    ("function", "what"), [(constant, "equal rewards"), (ordered, "the same rewards"), (brightness, None)]
)
def test_rewards_that_never_differ_are_noticed_once(tmp_path, caplog, function, what):
    rewards = [tiny_reward(), function]
    trained(tmp_path, reward_funcs=rewards, max_steps=2)
    assert "nothing can be learned" not in caplog.text
    trained(tmp_path, reward_funcs=rewards, max_steps=6)
    notices = [record.message for record in caplog.records if "nothing can be learned" in record.message]
    assert len(notices) == (what is not None)
    assert all(f"{what} by {function.__name__!r}" in notice for notice in notices)


def test_the_one_reward_of_a_set_is_not_taken_for_a_constant(tmp_path, caplog):
    trained(tmp_path, reward_funcs=[tiny_reward(), brightness], max_steps=3, loss_type="backprop")
    assert "nothing can be learned" not in caplog.text


def test_a_distance_that_does_not_see_the_images_is_noticed(tmp_path, caplog):
    real = FeatureStatistics.from_features(features(real_images()))
    blind = SubsetReplaceReward(lambda images: features(torch.zeros_like(images)), real)
    tiny_trainer(tmp_path, reward_funcs=[blind, brightness], max_steps=3).train()
    assert "equal rewards by 'subset_replace'" in caplog.text


def test_candidates_with_equal_rewards_are_noticed(tmp_path, caplog):
    tiny_merge_trainer(tmp_path, reward_funcs=constant, method="cma").train()
    assert "equal rewards by 'constant'" in caplog.text
