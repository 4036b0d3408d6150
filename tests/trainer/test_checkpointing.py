# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are whole pipelines, and a resumed run equals the uninterrupted one to the last bit."""

import json
import os
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers import real_images, tiny_pipeline, tiny_sit, tiny_trainer, two_spaces
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights, logged, weights
from trl_distreward import CheckpointPool, FeatureStatistics, SiTPipeline, SubsetReplaceReward, load_pipeline

# (settings, steps at which the run is interrupted)
CASES = {
    "rolling with average and decay": (
        {"reference_update": "rolling", "ema_decay": 0.5, "lr_scheduler_type": "linear"},
        [1, 3],
    ),
    "before and after a refresh": ({"reference_refresh_steps": 3}, [2, 3, 4]),
    "automatic refresh": ({"reference_refresh_steps": "auto", "refresh_drift": 0.3}, [2, 3]),
    "between the updates of a rollout": ({"num_iterations": 4, "epsilon": 0.2, "beta": 0.05}, [1, 3, 4, 5]),
    "in a second epoch": ({"max_steps": -1, "num_train_epochs": 3}, [2, 3]),
    "normalized ratios": ({"num_iterations": 2, "ratio_normalization": True, "offload_trajectories": True}, [1]),
    "windows, best of two": ({"sde_window_size": 2, "sde_window": "random", "best_of_n": 2}, [2]),
    "rejection sampling": ({"loss_type": "rft"}, [2]),
    "nft, rollouts of the old policy": ({"loss_type": "nft", "sample_old_policy": True, "ema_decay": 0.5}, [1, 3]),
    "transport": ({"loss_type": "transport", "transport_advantage": 0.5, "sampler": "ode"}, [3]),
    "adapter by transport between the updates of a rollout": (
        {"lora": True, "loss_type": "transport", "sampler": "ode", "num_iterations": 2, "beta": 0.1},
        [3],
    ),
    "adapter": ({"lora": True, "reference_update": "rolling", "ema_decay": 0.5}, [2]),
    "adapter between the updates of a rollout": ({"lora": True, "num_iterations": 2, "beta": 0.1}, [1]),
}


LORA = LoraConfig(r=2, target_modules=["qkv", "fc1"])


def trainer_for(output_dir, lora=False, **settings):
    return tiny_trainer(
        output_dir, peft_config=LORA if lora else None, **{"max_steps": 6, **SAVE_EVERY_STEP, **settings}
    )


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, case):
    settings, interruptions = CASES[case]
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    for step in interruptions:
        resumed = trainer_for(tmp_path / f"resumed-{step}", **settings)
        torch.manual_seed(1000 + step)  # nothing may depend on the global generator
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step
        assert_same_weights(resumed.network, whole.network)
        for key in ("reward", "reference_distance/features", "loss"):
            assert logged(resumed, key) == logged(whole, key), (step, key)
        if whole.ema is not None:
            assert all(torch.equal(resumed.ema.averages[n], v) for n, v in whole.ema.averages.items())


def test_every_run_has_its_own_scales_of_distances(tmp_path):
    def rewards(folder, reward, seed=0, resume=None):
        trainer = trainer_for(tmp_path / folder, reward_funcs=reward, seed=seed, max_steps=3, save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return logged(trainer, "reward")

    alone, reward = rewards("alone", two_spaces()), two_spaces()
    other = rewards("other", reward, seed=1)
    assert rewards("again", reward) == alone  # as if the reward were new
    assert rewards("resumed", reward, seed=1, resume=str(tmp_path / "other" / "checkpoint-2")) == other


@pytest.mark.parametrize("max_steps", [2, 3])  # at the end of an epoch, and within one
def test_resuming_a_finished_run_changes_nothing(tmp_path, max_steps):
    settings = {"max_steps": max_steps, "ema_decay": 0.5, **EVALUATE_EVERY_STEP}
    whole = trainer_for(tmp_path, **settings)
    assert whole.steps_per_epoch == 2
    whole.train()
    again = trainer_for(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == max_steps
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == f"checkpoint-{max_steps}"
    assert_same_weights(again.network, whole.network)
    assert all(torch.equal(again.ema.averages[name], value) for name, value in whole.ema.averages.items())
    assert again.num_images == whole.num_images > 0
    assert again.run_record.evaluations == whole.run_record.evaluations != []
    assert torch.equal(*(trainer.rewards.of_sets[0].features["features"] for trainer in (whole, again)))
    longer = trainer_for(tmp_path, **{**settings, "max_steps": max_steps + 1})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == max_steps + 1 and longer.num_images > whole.num_images


@pytest.mark.parametrize(
    ("written", "resumed", "message"),
    [
        ({"save_only_model": True}, {}, "no diffusion_state.pt: .*save_only_model=True.*as its model"),
        ({}, {"model": SiTPipeline(tiny_sit(hidden_size=32))}, "frozen_weights was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, written, resumed, message):
    trainer_for(tmp_path, max_steps=1, **written).train()
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
        trainer_for(tmp_path, max_steps=2, **resumed).train(resume_from_checkpoint=True)


class Extractor(torch.nn.Linear):
    name, resize = "mine", None

    def forward(self, images):
        return super().forward(images.flatten(1).float() / 255)


def test_resuming_with_another_extractor_is_refused(tmp_path):
    def train(seed, steps, resume=True):
        torch.manual_seed(seed)
        extractor = Extractor(16, 8)
        real = FeatureStatistics.from_features(extractor(real_images()).detach())
        trainer = trainer_for(tmp_path, reward_funcs=SubsetReplaceReward(extractor, real), max_steps=steps)
        trainer.train(resume_from_checkpoint=resume)

    train(0, 1, resume=None)
    train(0, 2)
    with pytest.raises(ValueError, match="subset_replace.extractor.features was .*mine"):
        train(1, 3)


def test_checkpoints_are_pipelines_and_old_ones_are_deleted(tmp_path):
    trainer = trainer_for(tmp_path, save_total_limit=2)
    start = weights(trainer.network)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "checkpoint-6", tmp_path / "out"):
        assert_same_weights(load_pipeline(folder).transformer, trainer.network)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert config["class_dropout_prob"] == 0.1 and "use_cache" not in config
    assert any(not torch.equal(start[name], value) for name, value in weights(trainer.network).items())


def test_a_checkpoint_of_an_adapter_holds_no_pipeline_and_loads_on_the_base(tmp_path):
    trainer = trainer_for(tmp_path, lora=True, max_steps=2, ema_decay=0.5, learning_rate=1e-2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["adapter"]
    assert not list(folder.glob("**/diffusion_pytorch_model*"))
    loaded = PeftModel.from_pretrained(tiny_pipeline().transformer, folder / "adapter")
    with trainer.evaluation_weights():
        assert_same_weights(loaded, trainer.network)
    pool = CheckpointPool([tmp_path / "checkpoint-1", folder])
    assert pool.adapter_config.r == 2 * 2  # ranks of both
    trainer.save_model()
    assert_same_weights(load_pipeline(tmp_path).transformer, loaded.merge_and_unload())


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    best = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True, **EVALUATE_EVERY_STEP}
    trainer = tiny_trainer(
        tmp_path, peft_config=LORA, max_steps=3, eval_metrics={"rising": Rising()}, **SAVE_EVERY_STEP, **best
    )
    trainer.train()
    assert trainer.weights_step == 1
    assert_same_weights(trainer.network, PeftModel.from_pretrained(tiny_sit(), tmp_path / "checkpoint-1" / "adapter"))


@pytest.mark.parametrize("moment", ["write_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_failure_while_saving_leaves_the_earlier_checkpoint_whole(tmp_path, moment):
    trainer = trainer_for(tmp_path, max_steps=3)
    original = getattr(trainer, moment)

    def full_disk(path, *args, **kwargs):
        original(path, *args, **kwargs)
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")

    setattr(trainer, moment, full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = trainer_for(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_checkpoint_between_updates_of_a_rollout_is_for_as_many_processes(tmp_path):
    trainer = trainer_for(tmp_path, num_iterations=2, max_steps=1)
    trainer.train()
    with pytest.raises(
        ValueError, match="^3 processes wrote this checkpoint between two updates of a rollout: resume on"
    ):
        trainer.load_process_state({**trainer.process_state(), "processes": 3})


# a single checkpoint is kept, and evaluations are due at every step
BEST = {"metric_for_best_model": "ode_distance_features", "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("strategy", "settings"), [("no", {}), ("best", {**BEST, **EVALUATE_EVERY_STEP, "learning_rate": 1e-7})]
)
def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path, strategy, settings):
    trainer = trainer_for(tmp_path, max_steps=50, save_strategy=strategy, **settings)

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Terminate())
    handler = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 2
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-2")
    assert signal.getsignal(signal.SIGTERM) == handler
