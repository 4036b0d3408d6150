# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.helpers import features, real_images, tiny_merge_trainer, tiny_pool, tiny_reward, tiny_sit, two_spaces
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights, calls_of, logged, weights
from trl_distreward import EMANet, FeatureStatistics, frechet_distance, load_pipeline
from trl_distreward.conditions import balanced_labels, rows_of_slots, strata_of_slots
from trl_distreward.generation import SamplingSchedule, image_generators, sample
from trl_distreward.merging.posthoc import LARGEST_SIGMA_REL
from trl_distreward.policies import to_uint8
from trl_distreward.trainer.merge_coefficient_config import METHODS, MergeCoefficientConfig


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny_pool(tmp_path_factory.mktemp("pool"))


def merged(folder, pool, **kwargs):
    """A trainer of merging coefficients after `train()`."""
    trainer = tiny_merge_trainer(folder, pool, **kwargs)
    trainer.train()
    return trainer


def weighted(pool, coefficients):
    files = [load_file(path) for path in pool]
    return {name: sum(w * f[name] for w, f in zip(coefficients, files, strict=True)) for name in files[0]}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "grid"])  # a grid has averages alone
def test_every_method_finds_a_better_merge_with_equally_many_images(tmp_path, pool, method):
    settings = {"max_steps": 5, "sampling_std": 0.3, "reference_set_size": 40, "num_eval_images": 40, "seed": 0}
    trainer = tiny_merge_trainer(tmp_path, pool, method=method, initial_coefficients="last", **settings)
    last = [0.0, 0.0, 0.0, 1.0]
    before = trainer.evaluate(coefficients=last)["eval_ode_distance_features"]
    assert trainer.coefficients.tolist() == [last]
    trainer.train()
    assert trainer.evaluate()["eval_ode_distance_features"] < before
    assert trainer.num_images == 40 * (1 + 5 * 5 + 4) == logged(trainer, "num_images")[-1]
    assert len(logged(trainer, "reward")) == 5 and logged(trainer, "coefficients/3")[-1] == trainer.coefficients[0, 3]


def test_a_policy_gradient_without_a_network_is_natural_evolution(tmp_path, pool):
    """With SGD at rate 1, the mean moves by the mean of advantages times deviations."""
    settings = {"policy_num_layers": 0, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 100.0}
    trainer = tiny_merge_trainer(tmp_path, pool, method="emanet", sampling_std=0.2, max_steps=1, **settings)
    calls, start = calls_of(trainer.judge, "judge"), trainer.mean
    trainer.train()
    ((candidates, _), values), _ = calls
    advantages = (values[:, 0] - values.mean()) / values.std()
    step = (advantages[:, None, None] * (candidates - start)).mean(dim=0)
    found = trainer.learnt_coefficients - start
    torch.testing.assert_close(found, step - step.mean(), atol=1e-6, rtol=1e-5)  # the sum stays one


def test_samples_come_closer_together_over_the_run(tmp_path):
    config = MergeCoefficientConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=5, sampling_std=0.1)
    assert [config.sampling_std_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.1, 0.065, 0.03, 0.03])


def test_candidates_of_a_step_share_noise_and_steps_differ(tmp_path, pool):
    trainer = tiny_merge_trainer(tmp_path, pool)
    twice = trainer.initial_coefficients.expand(2, 1, -1)
    first, second = trainer.judge.judge(twice, step=1).flatten().tolist()
    assert first == second
    assert trainer.judge.judge(twice, step=2)[0, 0] != first


def test_without_replacements_the_reward_is_minus_the_distance_of_the_candidates_set(tmp_path, pool):
    coefficients = torch.tensor([0.5, -0.25, 0.0, 0.75])
    trainer = tiny_merge_trainer(tmp_path, pool)
    value = trainer.judge.judge(coefficients[None, None], step=3).item()
    network = tiny_sit()
    network.load_state_dict(weighted(pool, coefficients.tolist()))
    generators = image_generators(trainer.args.seed, "candidate", 3, range(20))
    labels = balanced_labels(20, 3)
    x = sample(trainer.policy, network, labels, SamplingSchedule(3, "ode"), generators).sample
    real = FeatureStatistics.from_features(features(real_images()))
    own = FeatureStatistics.from_features(features(to_uint8(trainer.policy.decode(x))))
    assert value == pytest.approx(-frechet_distance(own, real), rel=1e-3)


def test_replacements_average_over_subsets_and_draws(tmp_path, pool):
    """Compares with Eq. 10: the mean of Eq. 4 over N_s x N_r subsets."""
    settings = {"num_subsets": 3, "num_replacements": 2, "replace_size": 4}
    trainer = tiny_merge_trainer(tmp_path, pool, **settings)
    (reward,) = trainer.rewards.of_sets
    calls, coefficients = calls_of(reward, "subset_rewards"), trainer.initial_coefficients
    value = trainer.judge.judge(coefficients[None], step=0).item()
    (((slots, _), rewards),) = calls
    assert slots.shape == (6, 4) and torch.equal(slots[0], slots[1]) and not torch.equal(slots[0], slots[2])
    assert len(set(slots[0].tolist())) == 4
    assert value == rewards.mean().item() and len(rewards.unique()) == 6
    assert trainer.args.images_per_candidate == 20 + 3 * 2 * 4
    again = tiny_merge_trainer(tmp_path, pool, **settings).judge.judge(coefficients[None], step=0)
    assert again.item() == value


def test_sets_and_replaced_subsets_keep_strata_in_proportion(tmp_path, pool):
    labels = [0] * 24 + [1] * 12 + [2] * 12  # strata that are not the classes
    dataset = [{"class_labels": i % 3, "kind": kind} for i, kind in enumerate(labels)]
    settings = {"num_subsets": 3, "num_replacements": 2, "replace_size": 4, "scale_set_size": 36}
    trainer = tiny_merge_trainer(tmp_path, pool, stratify_by="kind", train_dataset=dataset, **settings)
    strata = torch.tensor(strata_of_slots(dataset, "kind", 20, trainer.args.seed, None))
    assert strata.bincount().tolist() == [10, 5, 5]
    rows = rows_of_slots(48, 20, trainer.args.seed, labels)
    assert torch.equal(trainer.conditions, rows % 3)
    sets, replaced = calls_of(trainer.judge, "judge_set"), calls_of(trainer.rewards.of_sets[0], "subset_rewards")
    trainer._judge_start()
    assert torch.equal(sets[0][0][1], rows_of_slots(48, 36, trainer.args.seed, labels) % 3)
    for step in (0, 0, 1):  # two candidates of one step, and another step
        trainer.judge.judge(trainer.initial_coefficients[None], step)
    asked = [slots for (slots, _), _ in replaced]
    assert all(strata[subset].bincount(minlength=3).tolist() == [2, 1, 1] for slots in asked for subset in slots)
    assert torch.equal(asked[0], asked[1]) and not torch.equal(asked[0], asked[2])
    with pytest.raises(ValueError, match="no column 'topic'"):
        tiny_merge_trainer(tmp_path, pool, stratify_by="topic", train_dataset=dataset)


def test_several_rewards_are_weighted_and_spaces_divided_by_the_starts_distances(tmp_path, pool):
    def brightness(images, labels, slots, trainer_state, **kwargs):
        steps.append(trainer_state.global_step)
        return images.float().mean((1, 2, 3)).tolist()

    settings = {"reward_funcs": [two_spaces(), brightness], "reward_weights": [1.0, 0.01], "scale_set_size": 30}
    steps = []
    trainer = merged(tmp_path, pool, max_steps=2, **settings)
    assert trainer.num_images == 30 + 2 * 5 * 20 + 4 * 20 and set(steps) == {0, 1, 2}
    start = trainer.judge.judge_set(trainer.initial_coefficients, balanced_labels(30, 3), "start", step=0)
    assert start[0].item() == pytest.approx(-2)  # each space's distance, divided by itself
    of_sets, bright = (logged(trainer, f"rewards/{name}/mean")[0] for name in ("subset_replace", "brightness"))
    assert 0 < bright < 255 and logged(trainer, "reward")[0] == pytest.approx(of_sets + 0.01 * bright)


def test_weights_of_several_rewards_compare_spreads_and_not_units(tmp_path, pool):
    def brightness(images, **kwargs):
        return images.float().mean((1, 2, 3)).tolist()

    trainer = tiny_merge_trainer(tmp_path, pool, reward_funcs=[tiny_reward(), brightness])
    order = torch.tensor([[3.0, 1e6], [2.0, 0.0], [torch.nan, 9e9], [-9.0, 1.0]], dtype=torch.float64)
    fitness = trainer._fitness(order)
    assert fitness[[0, 1, 3]].argsort().tolist() == [2, 1, 0] and fitness[2].isnan()
    in_other_units = trainer._fitness(order * torch.tensor([1.0, 1e-9]))
    assert torch.allclose(fitness, in_other_units, equal_nan=True)


def test_a_reward_forgets_the_units_of_an_earlier_run(tmp_path, pool):
    reward, settings = two_spaces(), {"max_steps": 1}
    other = merged(tmp_path, pool, reward_funcs=reward, seed=1, initial_coefficients="last", **settings)
    trainer = merged(tmp_path, pool, reward_funcs=reward, **settings)
    alone = merged(tmp_path, pool, reward_funcs=two_spaces(), **settings)
    assert logged(trainer, "reward") == logged(alone, "reward")
    scales, images = dict(reward.first_distances), trainer.num_images
    for again in (other, trainer):
        again.train()  # goes on from what it has learnt, in its own units
        assert (reward.first_distances == scales) == (again is trainer)
    assert trainer.num_images == images


def judged_as(trainer, values):
    trainer.judge.judge = lambda candidates, step: torch.full((len(candidates), 1), values, dtype=torch.float64)


def test_candidates_that_make_no_images_are_the_worst(tmp_path, pool):
    trainer = tiny_merge_trainer(tmp_path, pool, method="cma", max_steps=1)
    judge, first = trainer.judge.judge, torch.tensor([[torch.nan], [1.0], [1.0], [1.0], [1.0]])
    trainer.judge.judge = lambda candidates, step: judge(candidates, step) * first[: len(candidates)]
    trainer.train()
    assert logged(trainer, "finite_candidates") == [0.8]
    assert trainer.learnt_coefficients.isfinite().all()
    assert not torch.equal(trainer.learnt_coefficients, trainer.initial_coefficients)
    # the last checkpoint, judged first at the end, makes no images either
    assert logged(trainer, "final_reward/last") == [-torch.inf] and trainer.coefficients[0, 3] != 1


@pytest.mark.parametrize("best", ["last", "uniform", "start", "learnt", None])
def test_the_result_is_the_best_of_learnt_and_simple_merges_on_fresh_noise(tmp_path, pool, caplog, best):
    trainer = tiny_merge_trainer(tmp_path, pool, max_steps=1)
    judge, order = trainer.judge.judge, ["last", "uniform", "start", "learnt"]

    def judged(candidates, step):
        values = judge(candidates, step)
        if step == 0:
            return values
        return values * torch.nan if best is None else values + 1000 * (torch.arange(4)[:, None] == order.index(best))

    trainer.judge.judge = judged
    trainer.train()
    assert torch.equal(trainer.coefficients, trainer._merges()[best or "start"])  # without any reward, the start
    assert (f"{best or 'start'!r} is the result, not what was learnt" in caplog.text) == (best != "learnt")
    trainer.save_model()
    saved = json.loads((tmp_path / "coefficients.json").read_text())
    assert saved["coefficients"][trainer.group_names[0]] == trainer.coefficients[0].tolist()


def test_equal_rewards_skip_the_update_and_a_run_without_images_ends(tmp_path, pool):
    trainer = tiny_merge_trainer(tmp_path, pool, method="emanet", max_steps=2, max_skipped_updates=1)
    judged_as(trainer, 0.0)
    trainer.args.max_skipped_updates = 2
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0, 1.0]
    judged_as(trainer, torch.nan)
    trainer.args.max_skipped_updates = 1
    with pytest.raises(RuntimeError, match="no candidate's images"):
        trainer.train()
    assert torch.equal(trainer.coefficients, trainer.initial_coefficients)


def test_the_saved_pipeline_is_the_merge_and_records_how_it_was_made(tmp_path, pool):
    trainer = merged(tmp_path, pool, max_steps=2, granularity="per_block")
    coefficients, groups = trainer.coefficients, trainer.groups
    assert coefficients.shape == (len(trainer.group_names), 4) and len(coefficients) > 3
    assert not torch.equal(coefficients[0], coefficients[1])
    torch.testing.assert_close(coefficients.sum(1), torch.ones(len(coefficients), dtype=torch.float64))
    trainer.save_model()
    trainer.create_model_card()
    loaded = load_pipeline(tmp_path).transformer
    assert trainer.merge().transformer is trainer.merged_network
    assert_same_weights(loaded, trainer.merged_network)
    rows = [weighted(pool, row) for row in coefficients.tolist()]
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.data, rows[groups[name]][name])
    about = json.loads((tmp_path / "coefficients.json").read_text())
    assert about["coefficients"] == dict(zip(trainer.group_names, coefficients.tolist(), strict=True))
    assert about["pool"] == trainer.pool.describe()
    assert about["num_images"] == trainer.num_images
    card = (tmp_path / "README.md").read_text()
    assert f"{coefficients[0, 3]:.4f}" in card and "step-3.safetensors" in card


def test_a_point_of_the_grid_is_a_stored_average(tmp_path, pool):
    stds = [LARGEST_SIGMA_REL / 4, LARGEST_SIGMA_REL / 2] * 2  # two widths at each of two times
    settings = {"method": "grid", "checkpoint_times": [1.0, 1.0, 2.0, 2.0], "checkpoint_stds": stds}
    trainer = tiny_merge_trainer(tmp_path, pool, num_generations=4, **settings)
    expected = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(trainer.search.points[1], expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="positive"):
        tiny_merge_trainer(tmp_path, pool, coefficient_map="softmax", **settings)


def test_the_network_of_the_mean_is_exact_under_bf16(tmp_path, pool):
    trainer = merged(tmp_path, pool, method="emanet", bf16=True, max_steps=2, learning_rate=0.1)
    fresh = EMANet(trainer.network.initial, scale=trainer.network.scale)
    fresh.load_state_dict(trainer.network.state_dict())
    assert torch.equal(trainer.mean, fresh().detach())
    assert not torch.equal(trainer.mean, trainer.network.initial)


def test_comparison_is_in_the_card(tmp_path, pool):
    trainer = merged(tmp_path, pool, max_steps=1, eval_samplers=["sde", "ode"])
    rows = trainer.compare()
    assert list(rows) == ["last", "uniform", "start", "learnt"]
    assert set(rows["learnt"]) == {"sde_distance_features", "ode_distance_features"}
    for name, given in (("learnt", trainer.learnt_coefficients), ("last", [0, 0, 0, 1.0])):
        alone = trainer.evaluate(coefficients=given)["eval_ode_distance_features"]
        assert rows[name]["ode_distance_features"] == pytest.approx(alone)
    trainer.create_model_card()
    assert f"| learnt | {rows['learnt']['sde_distance_features']:.4g}" in (tmp_path / "README.md").read_text()


def test_adapters_are_merged_and_saved_in_both_forms(tmp_path):
    folders = [str(tmp_path / f"adapter-{index}") for index in range(3)]
    for index, folder in enumerate(folders):
        model = tiny_sit()
        torch.manual_seed(index)
        get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)).save_pretrained(folder)
    trainer = merged(tmp_path / "run", folders, max_steps=1)
    trainer.save_model()
    saved = load_pipeline(tmp_path / "run").transformer
    name, prefix = "blocks.0.attn.qkv.weight", "base_model.model.blocks.0.attn.qkv.lora_"
    parts = [load_file(f"{folder}/adapter_model.safetensors") for folder in folders]
    changes = [part[f"{prefix}B.weight"] @ part[f"{prefix}A.weight"] for part in parts]
    change = sum(w * change for w, change in zip(trainer.coefficients[0].tolist(), changes, strict=True))
    expected = weights(tiny_sit())[name] + 8 / 2 * change  # times peft's alpha over the rank
    torch.testing.assert_close(weights(saved)[name], expected, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    pipeline = trainer.merge()
    trainer.merge([0.0, 0.0, 1.0])  # changes no earlier merge
    assert_same_weights(pipeline.transformer, saved)


RUNS = [
    {"method": "emanet", "lr_scheduler_type": "linear"},
    {"method": "cma", "num_replacements": 1, "replace_size": 3},
    {"method": "grid"},
    {"method": "cma", "granularity": "per_block"},
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: settings["method"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, pool, settings):
    """Also if a step is skipped."""
    settings = {"max_steps": 4, **SAVE_EVERY_STEP, **settings}
    whole = tiny_merge_trainer(tmp_path / "whole", pool, reward_funcs=two_spaces(), **settings)
    judge = whole.judge.judge
    whole.judge.judge = lambda candidates, step: judge(candidates, step) * (torch.nan if step == 1 else 1.0)
    whole.train()
    assert len(logged(whole, "reward")) == 3
    resumed = tiny_merge_trainer(tmp_path / "resumed", pool, reward_funcs=two_spaces(), **settings)
    torch.manual_seed(1000)  # nothing may depend on the global generator
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(resumed.coefficients, whole.coefficients)
    assert logged(resumed, "reward") == logged(whole, "reward")
    assert resumed.num_images == whole.num_images
    saved = json.loads((tmp_path / "whole" / "checkpoint-4" / "coefficients.json").read_text())
    assert saved["coefficients"][whole.group_names[0]] == whole.learnt_coefficients[0].tolist()


@pytest.mark.parametrize("method", ["emanet", "cma"])
def test_best_coefficients_come_back(tmp_path, pool, method):
    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(trainer.learnt_coefficients)

    kept, best = [], {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True, "max_steps": 2}
    settings = {"eval_metrics": {"rising": Rising()}, "callbacks": [Keep()], **SAVE_EVERY_STEP, **EVALUATE_EVERY_STEP}
    trainer = tiny_merge_trainer(tmp_path, pool, method=method, **best, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(trainer.learnt_coefficients, kept[0]) and not torch.equal(kept[0], kept[1])


def with_other_weights(path):
    """Writes a checkpoint with other weights beside the given one."""
    changed = path.replace(".safetensors", "-changed.safetensors")
    save_file({n: v + 1 if v.is_floating_point() else v for n, v in load_file(path).items()}, changed)
    return changed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, pool):
    folder = tmp_path_factory.mktemp("stopped")
    tiny_merge_trainer(folder, pool, method="grid", max_steps=1, **SAVE_EVERY_STEP).train()
    return str(folder / "checkpoint-1")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"method": "emanet"}, list, "method was 'grid' and is 'emanet'"),
        ({"coefficient_map": "none"}, list, "coefficient_map was 'affine' and is 'none'"),
        ({"granularity": "per_block"}, list, "granularity"),
        ({}, lambda pool: pool[:3], "checkpoints"),
        ({}, lambda pool: [pool[0], pool[2], pool[1], pool[3]], "checkpoints"),
        ({}, lambda pool: [*pool[:3], with_other_weights(pool[0])], "checkpoints"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(tmp_path, pool, stopped, settings, change, message):
    other = tiny_merge_trainer(tmp_path, change(pool), **{"method": "grid", **settings})
    with pytest.raises(ValueError, match=f"is of a run with other settings: {message}"):
        other.train(resume_from_checkpoint=stopped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "method='adam' is unknown"),
        ({"initial_coefficients": "first"}, "initial_coefficients='first' is unknown"),
        ({"fp16": True}, "bf16=True"),
        (
            {"save_only_model": True, "load_best_model_at_end": True, **EVALUATE_EVERY_STEP, "save_steps": 1},
            "needs the state that save_only_model",
        ),
        ({"num_generations": 1}, "num_generations=1"),
        ({"sampling_std": 0.0}, "sampling_std=0.0"),
        ({"method": "emanet", "sampling_std_decay": 0.0}, "sampling_std_decay=0.0"),
        ({"num_replacements": 1, "reference_set_size": 40}, "replace_size=50"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MergeCoefficientConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("given", ["0.5, -0.5,1", [0.5, -0.5, 1]])
def test_the_start_may_be_numbers(tmp_path, given):
    config = MergeCoefficientConfig(output_dir=str(tmp_path), use_cpu=True, initial_coefficients=given)
    assert config.initial_coefficients == [0.5, -0.5, 1.0]


def test_candidates_are_decoded_in_slices(tmp_path, pool):
    trainer = tiny_merge_trainer(tmp_path, pool, decode_batch_size=3)
    calls = calls_of(trainer.policy, "decode")
    trainer.judge.judge(trainer.initial_coefficients[None], step=1)
    sizes = [len(x) for (x,), _ in calls]
    assert sum(sizes) == 20 and max(sizes) == 3


def test_misfits_are_refused_before_training(tmp_path, pool):
    for settings, message in (
        ({"checkpoints": pool[:1]}, "at least 2"),
        ({"reward_funcs": tiny_reward(credit="leave_one_in")}, "set credit='shared'"),
        ({"coefficient_map": "softmax", "initial_coefficients": "last"}, "positive"),
        ({"initial_coefficients": [0.5, 0.25, 0.25]}, "3 .*4 checkpoints"),
        ({"guidance_scale": 1.5, "guidance_channels": 5}, "guidance_channels=5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_merge_trainer(tmp_path, **{"checkpoints": pool, **settings})
    trainer = tiny_merge_trainer(tmp_path, pool)
    trainer.judge.judge_set = lambda *args, **kwargs: torch.tensor([torch.nan])
    with pytest.raises(ValueError, match="the start's rewards .* are not finite"):
        trainer.train()
