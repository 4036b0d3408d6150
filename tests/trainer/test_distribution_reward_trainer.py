# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import dataclasses
import json
import math
import weakref
from functools import partial

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from tests.helpers import (
    features,
    first_gradients,
    logged,
    real_images,
    tiny_config,
    tiny_pipeline,
    tiny_reward,
    tiny_trainer,
    weights,
)
from trl_distreward import (
    DistributionRewardTrainer,
    FeatureDistance,
    FeatureStatistics,
    SubsetReplaceReward,
    load_pipeline,
)
from trl_distreward.generation import generate_images
from trl_distreward.metrics.image_metrics import MeanScore
from trl_distreward.policies import as_policy
from trl_distreward.sampling import transition
from trl_distreward.trainer.checks import check_sizes


def recorded(tmp_path, **kwargs):
    trainer = tiny_trainer(tmp_path, max_steps=1, max_grad_norm=0, **kwargs)
    return trainer, first_gradients(trainer)


def test_on_policy_ratio_is_exactly_one_though_label_dropout_is_configured(tmp_path):
    model = tiny_pipeline(class_dropout_prob=0.5)
    trainer = tiny_trainer(tmp_path, model=model)
    trainer.train()
    assert trainer.model.training
    for key in ("ratio/mean", "ratio/min", "ratio/max"):
        assert logged(trainer, key) == pytest.approx([1.0, 1.0], abs=1e-12)
    # not because the anchor is the value itself: the rollout's own log-probabilities are met as well
    assert max(logged(trainer, "delta_log_prob")) < 1e-5
    assert logged(trainer, "clip_ratio") == [0.0, 0.0]


def test_steps_are_scored_under_the_noise_that_they_were_drawn_with(tmp_path):
    class Quieter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            level = 0.7 - 0.2 * state.global_step
            args.rollout_schedule = dataclasses.replace(args.rollout_schedule, noise_level=level)

    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Quieter())
    trainer.train()
    assert max(logged(trainer, "delta_log_prob")) < 1e-5


def test_adapters_own_dropout_is_off_and_its_targets_have_a_default(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, lora_dropout=0.5), learning_rate=1e-2, max_steps=3)
    trainer.train()
    assert max(logged(trainer, "delta_log_prob")) < 1e-5
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in weights(trainer.network) if "lora_A" in name}
    assert adapted == {"qkv", "proj", "fc1", "fc2"}
    assert not any("x_embedder" in name for name in weights(trainer.network) if "lora_A" in name)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the weights below the adapter"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, init_lora_weights="pissa"))


@pytest.mark.parametrize("kwargs", [{}, {"reference_update": "rolling", "replace_size": 1}])
def test_gradient_is_that_of_the_objective(tmp_path, kwargs):
    """Equation 6 written down again from the kept trajectories, in one piece."""
    trainer, gradients = recorded(tmp_path, per_device_train_batch_size=1000, **kwargs)
    batch = trainer._buffer
    fresh = tiny_pipeline()
    model = fresh.transformer.train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    times = trainer.args.rollout_schedule.times
    total = 0
    for step in batch.steps:
        x, target = batch.states[step], batch.states[step + 1]
        t = torch.full((len(x),), times[step])
        velocity = fresh.predict_velocity(model, x, t, batch.cond["class_labels"])
        score = transition(
            x, velocity, times[step], times[step + 1], noise_schedule="sit", noise_level=1.0, prev_sample=target
        )
        total = total - (score.log_prob * batch.advantages).mean() / len(batch.steps)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3)


def test_micro_batch_size_changes_no_gradient(tmp_path):
    _, whole = recorded(tmp_path, per_device_train_batch_size=1000, rollout_batch_size=4)
    _, pieces = recorded(tmp_path, per_device_train_batch_size=5, rollout_batch_size=4)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6, rtol=1e-4)


def test_reward_and_kept_advantages_are_those_of_a_recomputation(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    seen = {}
    reward = trainer.reward_funcs[0]
    score = reward.score

    def spy(slots, new):
        seen["reference"] = {k: v.clone() for k, v in reward.features.items()}
        seen["slots"], seen["new"], seen["rewards"] = slots, new, score(slots, new)
        return seen["rewards"]

    reward.score = spy
    trainer.train()
    assert sorted(map(len, map(set, seen["slots"].tolist()))) == [2] * 6
    real = FeatureStatistics.from_features(features(real_images()))
    for b, slots in enumerate(seen["slots"]):
        updated = seen["reference"]["features"].clone()
        updated[slots] = seen["new"]["features"][2 * b : 2 * b + 2]
        distance = FeatureDistance(lambda x: x, real)
        distance.update(updated)
        assert seen["rewards"][b].item() == pytest.approx(-distance.compute(), rel=1e-9)
    rewards = seen["rewards"]
    advantages = (rewards - rewards.mean()) / rewards.std()
    top = advantages.topk(3).values.repeat_interleave(2).sort().values
    torch.testing.assert_close(trainer._buffer.advantages.double().sort().values, top, atol=1e-6, rtol=1e-6)
    assert logged(trainer, "advantage_kept") == [0.5]


def test_conditions_of_new_images_are_those_of_their_slots(tmp_path):
    labels = []

    def spy(images, conditions, slots, **kwargs):
        labels.append((conditions, slots))
        return torch.arange(len(images), dtype=torch.float64)

    dataset = Dataset.from_dict({"class_labels": [2, 2, 1, 2, 1]})
    trainer = tiny_trainer(tmp_path, max_steps=1, reward_funcs=[tiny_reward(), spy], reward_weights=[1.0, 0.1])
    trainer = DistributionRewardTrainer(tiny_pipeline(), [tiny_reward(), spy], trainer.args, train_dataset=dataset)
    trainer.train()
    conditions, slots = labels[-1]
    assert torch.equal(conditions, trainer.conditions[slots.flatten()])
    assert torch.bincount(trainer.conditions, minlength=3)[0] == 0
    assert torch.bincount(trainer.conditions, minlength=3)[2] in (14, 15)  # three fifths of 24


def test_refresh_comes_every_so_many_steps_and_rolling_only_once(tmp_path):
    for kwargs, expected in (({"reference_refresh_steps": 2}, 3), ({"reference_update": "rolling"}, 1)):
        trainer = tiny_trainer(tmp_path, max_steps=5, **kwargs)
        trainer.train()
        assert len(logged(trainer, "seconds/refresh")) == expected


def test_rolling_reference_set_is_made_of_the_newest_images(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, reference_update="rolling", replace_size=2)
    trainer.train()  # 2 x 12 distinct slots of 24: every place has been taken anew
    model = tiny_pipeline()
    assert trainer.slot_sampler._pending.numel() == 0
    schedule = trainer.args.rollout_schedule
    policy = trainer.policy.__class__(model)
    first = [images for images, _ in generate_images(policy, trainer.conditions, schedule, batch_size=24)][0]
    old = trainer.reward_funcs[0].extract(first)["features"]
    assert not (trainer.reward_funcs[0].features["features"] == old).all(dim=1).any()


def test_equal_rewards_skip_the_update_and_say_so(tmp_path, caplog):
    def constant(images, **kwargs):
        return [0.1] * len(images)

    trainer = tiny_trainer(tmp_path, reward_funcs=constant)
    before = weights(trainer.network)
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.network.named_parameters())
    assert logged(trainer, "skipped_updates") == [1.0, 1.0]
    assert "update is skipped" in caplog.text


def test_update_raises_the_density_of_rewarded_trajectories(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, learning_rate=1e-3, top_advantage_quantile=1.0)
    trainer.train()
    with torch.no_grad():
        micros = [m for m, _ in trainer._micro_batches(trainer._buffer)]
        gains = torch.cat(
            [
                trainer.pair_loss.score(partial(trainer._velocity, trainer.network), m).log_prob - m["drawn_log_probs"]
                for m in micros
            ]
        )
        advantages = torch.cat([m["advantages"] for m in micros])
    assert (gains * advantages).mean() > 0


def test_several_updates_from_one_generation_anchor_on_the_first(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, num_iterations=2, epsilon=0.2)
    trainer.train()
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    assert [low[0], high[0], low[2], high[2]] == pytest.approx([1.0] * 4, abs=1e-6)
    assert low[1] < 1 - 1e-5 and high[1] > 1 + 1e-5
    assert len(logged(trainer, "reward")) == 2


def test_kl_is_zero_at_first_and_grows(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, beta=0.1, learning_rate=1e-2)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-10) and kl[2] > 1e-5
    assert trainer.reference_model is not None and not any(
        p.requires_grad for p in trainer.reference_model.parameters()
    )


def test_saved_model_is_a_pipeline_with_the_trained_weights(tmp_path):
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = load_pipeline(tmp_path / "out")
    expected = weights(trainer.network)
    assert all(torch.equal(p, expected[n]) for n, p in loaded.transformer.named_parameters())
    assert not torch.equal(
        expected["blocks.0.attn.qkv.weight"], weights(tiny_pipeline().transformer)["blocks.0.attn.qkv.weight"]
    )
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["class_dropout_prob"] == 0.1 and "use_cache" not in config


def test_average_is_evaluated_and_saved_and_the_raw_weights_come_back(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", max_steps=3, ema_decay=0.5, learning_rate=1e-2)
    history = [weights(trainer.network)]

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            history.append(weights(trainer.network))

    trainer.add_callback(Keep())
    trainer.train()
    name = "blocks.1.mlp.fc2.weight"
    # weights after each update count half of the next one's; those before the first do not count
    average = (history[1][name] + 2 * history[2][name] + 4 * history[3][name]) / 7
    trainer.save_model(str(tmp_path / "out"))
    saved = load_pipeline(tmp_path / "out").transformer
    torch.testing.assert_close(dict(saved.named_parameters())[name], average, atol=1e-6, rtol=1e-5)
    assert torch.equal(weights(trainer.network)[name], history[-1][name])
    with pytest.raises(RuntimeError, match="inside"), trainer.evaluation_weights():
        raise RuntimeError("inside")
    assert torch.equal(weights(trainer.network)[name], history[-1][name])


def test_evaluation_reports_both_samplers_and_repeats(tmp_path):
    real = FeatureStatistics.from_features(real_images().flatten(1).float())
    extra = {"pixels": FeatureDistance(lambda x: x.flatten(1).float(), real)}
    trainer = tiny_trainer(tmp_path, eval_metrics=extra, num_eval_images=33)
    first, again, other = trainer.evaluate(), trainer.evaluate(), trainer.evaluate(seed=7)
    keys = [f"eval_{s}_{m}" for s in ("sde", "ode") for m in ("distance_features", "pixels")]
    for key in keys:
        assert math.isfinite(first[key]) and first[key] == again[key] != other[key]
    # the same numbers, by hand
    metric = FeatureDistance(features, FeatureStatistics.from_features(features(real_images())))
    schedule = trainer.args.eval_schedules["ode"]
    batches = generate_images(trainer.policy, trainer.eval_conditions, schedule, batch_size=8, stream="evaluation")
    for images, _ in batches:
        metric.update(images)
    assert metric.compute() == pytest.approx(first["eval_ode_distance_features"], rel=1e-5)


def test_evaluation_during_training_picks_the_best_checkpoint(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        learning_rate=5e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ode_distance_features",
    )
    trainer.train()
    distances = logged(trainer, "eval_ode_distance_features")
    assert trainer.state.best_metric == min(distances)
    assert trainer.evaluate()["eval_ode_distance_features"] == pytest.approx(min(distances), rel=1e-6)
    step = trainer.state.best_global_step
    assert step < 4  # the card shows the weights that are kept, and no evaluation of others
    trainer.evaluate(seed=7)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["ode_distance_features"] == pytest.approx(min(distances), rel=1e-6)
    assert f" {step} updates" in card.text and f"| step {step} |" in card.text
    best = load_pipeline(trainer.state.best_model_checkpoint).transformer
    assert all(torch.equal(p, weights(trainer.network)[n]) for n, p in best.named_parameters())


def test_model_may_be_a_folder_and_the_card_names_no_path(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "run", model=str(tmp_path / "base"), save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "model_index.json").is_file()
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()


def test_half_precision_weights_are_trained_in_float32(tmp_path, caplog):
    pipeline = tiny_pipeline()
    pipeline.to(torch.bfloat16)
    trainer = tiny_trainer(tmp_path, model=pipeline, beta=0.1, max_steps=1)
    assert "half precision" in caplog.text
    for network in (trainer.network, trainer.reference_model):
        assert all(p.dtype == torch.float32 for p in network.parameters())
    trainer.train()
    assert logged(trainer, "kl") == [0.0]


def test_guidance_is_that_of_a_policy_that_is_given(tmp_path):
    policy = as_policy(tiny_pipeline(), guidance_scale=2.0)
    assert tiny_trainer(tmp_path, model=policy).args.guidance_scale == 2.0  # which the card and the record name
    assert tiny_trainer(tmp_path, model=policy, guidance_scale=2.0).policy is policy
    with pytest.raises(ValueError, match="guidance_scale=4.0, but the ClassConditionalPolicy that is given"):
        tiny_trainer(tmp_path, model=policy, guidance_scale=4.0)


def test_image_that_decodes_to_nan_is_not_judged_as_a_black_one(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    decode, calls = trainer.policy.decode, []

    def overflow(x):
        images = decode(x)
        calls.append(len(x))
        if trainer.state.global_step == 1:
            images[0] = torch.nan
        return images

    trainer.policy.decode = overflow
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0] and (tmp_path / "skipped" / "step-1.pt").is_file()
    with pytest.raises(ValueError, match="not finite"):
        trainer.policy.decode = lambda x: decode(x) * torch.nan
        trainer.evaluate()


def test_second_run_of_a_trainer_makes_its_own_reference_set(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert len(logged(trainer, "seconds/refresh")) == 1


def test_lora_trains_the_adapter_only_and_saves_both_forms(tmp_path):
    peft_config = LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules="x_embedder.proj")
    trainer = tiny_trainer(tmp_path / "run", peft_config=peft_config, beta=0.1, learning_rate=1e-2)
    assert isinstance(trainer.model, PeftModel) and trainer.reference_model is None
    before = weights(trainer.network)
    trainer.train()
    moved = {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert logged(trainer, "kl")[1] > 0
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    merged = load_pipeline(tmp_path / "out").transformer.eval()
    x, t, labels = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 1])
    expected = trainer.network.eval()(x, t, labels).sample
    torch.testing.assert_close(merged(x, t, labels).sample, expected, atol=1e-4, rtol=1e-4)


def test_small_changes_of_a_network_in_half_precision_are_saved(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    before = {name: value.float() for name, value in weights(pipeline.transformer).items()}
    trainer = tiny_trainer(tmp_path, pipeline, peft_config=LoraConfig(r=2, target_modules=["qkv"]), learning_rate=1e-4)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    merged = weights(load_pipeline(tmp_path / "out").transformer)
    changes = {name: merged[name].float() - value for name, value in before.items()}
    layers = {name: module for name, module in trainer.network.named_modules() if hasattr(module, "get_delta_weight")}
    assert len(layers) == 2
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert 0 < expected.abs().max() < 2**-9 * layer.weight.abs().max()  # bfloat16 would lose it
        changed = changes[name.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(changed, expected, atol=1e-7, rtol=1e-2)


def test_activation_checkpointing_stays_in_the_configuration(tmp_path):
    config = tiny_config(tmp_path, max_steps=1, activation_checkpointing=True)
    for _ in range(2):  # the second trainer of a configuration has it as well
        trainer = DistributionRewardTrainer(model=tiny_pipeline(), reward_funcs=tiny_reward(), args=config)
        assert trainer.network.gradient_checkpointing
    copied = weakref.ref(copy.deepcopy(trainer._skeleton))
    assert copied() is None  # what is saved is a copy of it, which nothing holds on to
    trainer.train()
    assert json.loads((tmp_path / "run.json").read_text())["config"]["values"]["activation_checkpointing"] is True


def test_tensorboard_accepts_a_diffusers_config(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_trainer(tmp_path, max_steps=1, report_to="tensorboard").train()
    assert any(path.name.startswith("events") for path in tmp_path.rglob("*"))


def test_model_card_names_the_recipe_and_the_change(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    trainer.create_model_card(model_name="tiny", tags="mine", license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("diffusers", "apache-2.0")
    assert {"mine", "distribution-reward"} <= set(card.data.tags)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = logged(trainer, "eval_ode_distance_features")[-1]
    assert results["ode_distance_features"] == pytest.approx(last, abs=1e-6)
    assert "2607.02291" in card.text and "| ode_distance_features |" in card.text and "step 0 | step 2" in card.text
    assert "| `replace_size` | `2` |" in card.text and "| `learning_rate` | `0.001` |" in card.text


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": "no/such/folder"}, FileNotFoundError, "no folder"),
        ({"model": object()}, TypeError, "DiffusionPolicy"),
        (
            {"reward_funcs": SubsetReplaceReward(features, FeatureStatistics.from_features(torch.randn(20, 5)))},
            ValueError,
            "dimension 8, but its real statistics have 5",
        ),
        (
            {
                "reward_funcs": SubsetReplaceReward(
                    lambda x: features(x)[:1], FeatureStatistics.from_features(torch.randn(20, 8))
                )
            },
            ValueError,
            "for 2 images",
        ),
        (
            {
                "reward_funcs": SubsetReplaceReward(
                    lambda x: features(x) * float("nan"), FeatureStatistics.from_features(torch.randn(20, 8))
                )
            },
            ValueError,
            "NaN or infinite",
        ),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "2 entries for 1 reward functions"),
        ({"reward_funcs": [tiny_reward(), tiny_reward()]}, ValueError, "share names"),
        ({"reward_funcs": lambda images, **kwargs: [0.0] * len(images), "best_of_n": 2}, ValueError, "best_of_n=2"),
        ({"metric_for_best_model": "eval_fid"}, ValueError, "choose one of eval_sde_distance_features"),
        (
            {"metric_for_best_model": "ode_distance_features", "greater_is_better": True},
            ValueError,
            "would keep the worst .* set greater_is_better=False",
        ),
        (
            {
                "metric_for_best_model": "eval_ode_score",
                "eval_metrics": {"score": MeanScore(lambda images, conditions: [0.0] * len(images))},
            },
            ValueError,
            "would keep the worst .* set greater_is_better=True",
        ),
    ],
)
def test_misfits_are_refused_before_training(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny_trainer(tmp_path, **kwargs)


def test_labels_the_model_does_not_know_are_refused(tmp_path):
    args = tiny_trainer(tmp_path).args
    dataset = Dataset.from_dict({"class_labels": [0, 3]})
    with pytest.raises(ValueError, match="labels must lie in 0 to 2"):
        DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), args, train_dataset=dataset)
    with pytest.raises(ValueError, match="column 'class_labels'"):
        DistributionRewardTrainer(tiny_pipeline(), tiny_reward(), args, train_dataset=Dataset.from_dict({"y": [0]}))


def test_reward_function_of_the_wrong_length_is_named(tmp_path):
    def short(images, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="'short' returned 1 values for 12 images"):
        tiny_trainer(tmp_path, reward_funcs=short).train()


def test_unknown_pipeline_is_refused_with_a_pointer_to_the_protocol(tmp_path):
    class UnknownPipeline(DiffusionPipeline):
        pass

    with pytest.raises(TypeError, match="UnknownPipeline is not a pipeline this library knows .*DiffusionPolicy"):
        tiny_trainer(tmp_path, model=UnknownPipeline())


def test_subsets_must_divide_among_processes(tmp_path):
    trainer = tiny_trainer(tmp_path)
    check_sizes(trainer.args, trainer.rewards, 3)
    with pytest.raises(ValueError, match="num_subsets=6 is not divisible among 4 processes"):
        check_sizes(trainer.args, trainer.rewards, 4)
