# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig

from tests.helpers import (
    features,
    real_images,
    tiny_config,
    tiny_pipeline,
    tiny_reward,
    tiny_sit,
    tiny_trainer,
    tiny_vae,
)
from tests.policies_parts import PROMPTS, ddim
from tests.policies_tiny import flux, stable_diffusion
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, SiTPipeline, SubsetReplaceReward
from trl_distreward.metrics.image_metrics import MeanScore
from trl_distreward.trainer import dry_run as module
from trl_distreward.trainer.dry_run import (
    check_resources,
    dry_run,
    evaluations_of,
    format_prediction,
    networks,
    seconds_per_step,
)
from trl_distreward.trainer.estimates import num_events, num_refreshes, rows_per_process
from trl_distreward.trainer.measurement import AllocatedBytes, Measurement, _measure_generation, measure

BACKPROP = {"loss_type": "backprop", "top_advantage_quantile": 0.25}


def counted_pipeline(**kwargs):
    """A pipeline, and the list of the batch sizes its network has seen, copies of the network included."""
    pipeline, seen = tiny_pipeline(**kwargs), []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return pipeline, seen


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"guidance_scale": 2.0, "beta": 0.1},
        {"num_iterations": 2, "reference_refresh_steps": 1, "max_steps": 4},
        {"best_of_n": 2, "reference_update": "rolling", "selection": "top_bottom"},
        {"loss_type": "rft"},
        {"sde_window_size": 2, "selection": "all"},
        {"timestep_fraction": 0.5, "credit": "leave_one_in", "reference_refresh_steps": 1},
        {**BACKPROP, "backprop_steps": "2", "checkpoint_steps": True, "beta": 0.1},
        {**BACKPROP, "backprop_draws": 2, "sampler": "ode", "last_step_size": None},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_predicted_network_evaluations_are_those_of_a_real_step(tmp_path, kwargs):
    kwargs, pipeline_and_seen = dict(kwargs), counted_pipeline()
    pipeline, seen = pipeline_and_seen
    reward = tiny_reward(credit=kwargs.pop("credit", "shared"))
    trainer = tiny_trainer(tmp_path, pipeline, reward, **kwargs)
    args, steps = trainer.args, trainer.args.max_steps
    predicted = evaluations_of(trainer)
    trainer.train()
    assert sum(seen) == predicted.of_training(steps, args.num_iterations, num_refreshes(args, steps))
    seen.clear()
    trainer.evaluate()
    assert sum(seen) == predicted.evaluation


def test_predictions_hold_for_any_number_of_processes():
    # 24 images in batches of 5 by 3 processes: 15 and 9
    assert rows_per_process(24, 5, 3) == 5 + 3
    assert sum(rows_per_process(24, 5, p) * p for p in (1, 2, 3)) == 24 + 24 + 24
    assert num_events("steps", 5, 10, epoch=3, at_end=True) == 2
    assert num_events("steps", 4, 10, epoch=3) == 2 and num_events("steps", 4, 10, epoch=3, at_end=True) == 3
    assert num_events("no", 5, 10, epoch=3, at_end=True) == 0 and num_events("steps", 0.25, 10, epoch=3) == 3
    assert num_events("epoch", 500, 10, epoch=3) == 3


@pytest.mark.parametrize("draws", [1, 3])
def test_predicted_time_is_that_of_all_images_that_are_judged(tmp_path, draws):
    trainer = tiny_trainer(tmp_path, **BACKPROP, backprop_steps="1", backprop_draws=draws)
    judged = []
    extract = trainer.rewards.functions[0].extract
    trainer.rewards.functions[0].extract = lambda images, *args, **kw: (
        judged.append(images) or extract(images, *args, **kw)
    )
    tails = trainer.rollouts.tails(trainer.network, torch.arange(12), 0)
    nothing = dict.fromkeys((field.name for field in fields(Measurement)), 0.0)
    of_images = Measurement(**nothing | {"decoding": 2.0, "features": 1.0})
    seconds = seconds_per_step(trainer, of_images, evaluations_of(trainer), 0, 1)
    assert sum(map(len, judged)) == 12 * len(tails) == seconds["reward"] == seconds["rollout"] / 2
    scored = seconds_per_step(trainer, Measurement(**nothing | {"scoring": 1.0}), evaluations_of(trainer), 0, 1)
    assert scored["reward"] == draws


@pytest.mark.parametrize(
    ("kwargs", "adapter"),
    [
        ({"ema_decay": 0.9}, False),
        ({"num_iterations": 2, "num_subsets": 12}, False),
        ({}, True),
        ({"save_only_model": True}, False),
    ],
    ids=["average", "within a generation", "adapter", "model only"],
)
def test_predicted_checkpoint_weighs_what_a_real_one_does(tmp_path, kwargs, adapter):
    def trainer(folder):
        peft_config = LoraConfig(r=16) if adapter else None
        settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "num_inference_steps": 2, **kwargs}
        pipeline = tiny_pipeline(hidden_size=128, num_layers=3)
        return tiny_trainer(tmp_path / folder, pipeline, peft_config=peft_config, **settings)

    prediction = dry_run(trainer("dry"))
    trainer("real").train()
    folder = tmp_path / "real" / "checkpoint-1"
    real = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert sum(prediction.checkpoint.values()) == pytest.approx(real, rel=0.1)


def test_an_adapter_counts_for_every_file_it_is_saved_in(tmp_path):
    trainer = DistributionRewardTrainer(
        model=stable_diffusion(ddim(set_alpha_to_one=True)),
        reward_funcs=lambda images, **kwargs: images.float().mean(dim=(1, 2, 3)),
        args=tiny_config(tmp_path, num_subsets=2, replace_size=1, reference_set_size=4),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=256),
    )
    trainer.save_model()
    files = list((tmp_path / "adapter").glob("*.safetensors"))
    assert networks(trainer).adapter == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)


@pytest.mark.parametrize(
    "kwargs", [{"ema_decay": 0.9, "guidance_scale": 2.0}, {**BACKPROP, "backprop_steps": "2"}], ids=str
)
def test_predicted_memory_is_what_a_real_run_holds(tmp_path, kwargs):
    shape = {"hidden_size": 64, "num_layers": 3, "sample_size": 4}
    prediction = dry_run(tiny_trainer(tmp_path, tiny_pipeline(**shape), **kwargs))
    trainer = tiny_trainer(tmp_path, tiny_pipeline(**shape), **kwargs)
    held = networks(trainer).weights + (trainer.ema is not None) * networks(trainer).weights
    with AllocatedBytes() as counter:
        trainer.train()
    predicted = max(prediction.memory[phase] for phase in ("rollout", "reward", "update"))
    assert predicted == pytest.approx(counter.most + held, rel=0.05)


def latent_trainer(folder, **kwargs):
    """Of a pipeline whose VAE needs far more memory than its network."""
    pipeline = SiTPipeline(tiny_sit(in_channels=4, hidden_size=4, num_layers=1, num_attention_heads=1), tiny_vae())
    pipeline.set_progress_bar_config(disable=True)
    real = FeatureStatistics.from_features(features(real_images()))
    reward = SubsetReplaceReward(lambda images: features(images[:, :1, :4, :4]), real)
    return tiny_trainer(folder, pipeline, reward, **{"per_device_train_batch_size": 4, **kwargs})


@pytest.mark.parametrize(("rollout_batch", "eval_batch"), [(16, 4), (4, 64)])
def test_predicted_memory_of_evaluation_is_that_of_its_own_batches(tmp_path, rollout_batch, eval_batch):
    settings = {"rollout_batch_size": rollout_batch, "per_device_eval_batch_size": eval_batch}
    settings |= {"decode_batch_size": 4, "eval_samplers": ["ode"], "num_eval_images": 64}
    transients = measure(latent_trainer(tmp_path, **settings)).transients
    trainer = latent_trainer(tmp_path, **settings)
    with AllocatedBytes() as counter:
        trainer.evaluate()
    predicted = max(transients.evaluation, transients.eval_decoding, transients.judging)
    assert predicted == pytest.approx(counter.most, rel=0.1)


@pytest.mark.parametrize("decode_batch", [None, 8])
def test_what_is_proposed_for_a_large_decoder_is_its_batch(tmp_path, monkeypatch, decode_batch):
    settings = {"rollout_batch_size": 16, "decode_batch_size": decode_batch, "reference_set_size": 32}
    settings["num_subsets"] = 16
    memory = dry_run(latent_trainer(tmp_path, **settings)).memory
    transient = measure(latent_trainer(tmp_path, **settings)).transients.decoding
    limit = memory["rollout"] - transient / 4
    monkeypatch.setattr(module, "memory_capacity", lambda *_: limit / module.HEADROOM)
    (problem,) = [p for p in dry_run(latent_trainer(tmp_path, **settings)).problems if p.startswith("rollout")]
    proposed = dict(part.rstrip(".").split("=") for part in problem.split("set ")[1].split(" or "))
    size = (decode_batch or 16) * 3 // 4
    assert proposed.pop("offload_trajectories", None) in (None, "True")
    assert {name: int(value) for name, value in proposed.items()} in (
        {"decode_batch_size": size, "rollout_batch_size": size},
        {"decode_batch_size": size - 1, "rollout_batch_size": size - 1},
    )
    for name, value in proposed.items():
        smaller = dry_run(latent_trainer(tmp_path, **settings | {name: int(value)}))
        assert smaller.memory["rollout"] <= limit * 1.02


def test_every_process_evaluates_the_images_of_all(tmp_path, monkeypatch):
    class Seen:
        def __init__(self):
            self.batches = []

        def update(self, images, conditions):
            assert len(images) == len(conditions)
            self.batches.append(len(images))

        def reset(self):
            pass

    seen = Seen()
    trainer = tiny_trainer(tmp_path, eval_metrics={"seen": seen}, eval_strategy="steps", eval_steps=1)
    seen.batches.clear()
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with torch.no_grad():
        _measure_generation(trainer, trainer.network, 0.0, 0, 0.0, 1)
    assert set(seen.batches) == {3 * 5}
    nothing = dict.fromkeys((field.name for field in fields(Measurement)), 0.0)
    seconds = seconds_per_step(trainer, Measurement(**nothing | {"judging": 1.0}), evaluations_of(trainer), 0, 2)
    assert seconds["evaluation"] == len(trainer.eval_conditions) * len(trainer.args.eval_schedules)


@pytest.mark.parametrize("distilled", [True, False])
def test_only_guidance_by_a_second_sample_doubles_network_evaluations(tmp_path, distilled):
    pipeline, seen = flux(guidance_embeds=distilled), []
    trainer = DistributionRewardTrainer(
        model=pipeline,
        reward_funcs=lambda images, **kwargs: images.float().mean(dim=(1, 2, 3)),
        args=tiny_config(tmp_path, reference_set_size=4, num_subsets=2, replace_size=1, guidance_scale=2.0),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_metrics={"mean": MeanScore(lambda images, **kwargs: images.float().mean(dim=(1, 2, 3)))},
    )
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    trainer.evaluate()
    assert sum(seen) == evaluations_of(trainer).evaluation


def test_a_dry_run_names_the_phases_and_the_settings_that_do_not_fit(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, **settings)
    trainer.evaluate = None  # not called
    prediction = dry_run(trainer)
    assert prediction.fits and prediction.steps == 4 and not list(tmp_path.glob("checkpoint-*"))
    assert all(prediction.seconds[phase] > 0 for phase in ("rollout", "reward", "update", "refresh", "evaluation"))
    assert prediction.device_hours == pytest.approx(sum(prediction.seconds.values()) * 4 / 3600)
    printed = format_prediction(prediction)
    assert "4 steps on CPU" in printed and printed.endswith("fits")

    limit = prediction.memory["update"] * 0.9
    monkeypatch.setattr(module, "memory_capacity", lambda *_: limit / module.HEADROOM)
    monkeypatch.setattr(module, "free_disk", lambda _: sum(prediction.checkpoint.values()) * 3)
    prediction = dry_run(tiny_trainer(tmp_path, **settings))
    update, disk = prediction.problems[-2:]
    assert update.startswith("update takes") and "per_device_train_batch_size=" in update
    size = int(update.split("per_device_train_batch_size=")[1].split()[0])
    assert 1 <= size < 7 and "activation_checkpointing=True" in update
    assert "save_only_model" in disk or "save_total_limit" in disk
    # what is proposed fits
    smaller = dry_run(tiny_trainer(tmp_path, per_device_train_batch_size=size, rollout_batch_size=1))
    assert smaller.memory["update"] <= limit * 1.02


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path / "not" / "there", save_strategy="steps", save_steps=1, ema_decay=0.9)
    check_resources(trainer)
    monkeypatch.setattr(module, "memory_capacity", lambda *_: 1000.0)
    with pytest.raises(RuntimeError, match="weights, gradients and optimizer take .* use_peft=True or ema_decay=0"):
        check_resources(trainer)
    monkeypatch.undo()
    monkeypatch.setattr(module, "free_disk", lambda _: 1000)
    with pytest.raises(RuntimeError, match="checkpoints take up to .* set save_only_model=True"):
        check_resources(trainer)


def test_checkpoints_that_a_run_replaces_count_as_free(tmp_path):
    before = module.free_disk(tmp_path / "new")
    old = tmp_path / "new" / "checkpoint-5"
    old.mkdir(parents=True)
    (old / "optimizer.pt").write_bytes(bytes(5_000_000))
    assert module.free_disk(Path(tmp_path / "new")) >= before - 4_000_000


def test_allocated_bytes_follow_the_life_of_storages():
    x = torch.ones(1000)
    with AllocatedBytes() as counter:
        y = x + 1
        view = y.view(10, 100)
        del y
        assert counter.now == 4000
        x.add_(1)
        del view
        assert counter.now == 0
        z = x.double()
    assert (counter.now, counter.most) == (8000, 8000)
    del z
