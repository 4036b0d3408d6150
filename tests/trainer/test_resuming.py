# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What is damaged, changed or foreign does not pass silently when a run starts or resumes."""

import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers import features, real_images, tiny_pipeline, tiny_reward, tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights, weights
from trl_distreward import SubsetReplaceReward, load_pipeline
from trl_distreward.trainer import checkpointing
from trl_distreward.trainer.resuming import damage, write_manifest


def trainer_for(output_dir, steps, **settings):
    return tiny_trainer(output_dir, **{"max_steps": steps, **SAVE_EVERY_STEP, **settings})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


FAULTS = {
    "deleted": lambda path: path.unlink(),
    "one bit flipped": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps with everything that a checkpoint can hold."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, 3, ema_decay=0.5, num_iterations=2).train()
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_in_any_file_of_a_checkpoint_is_named(tmp_path, run, fault):
    whole, folder = run / "checkpoint-3", tmp_path / "copy"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "process_state_0.pt", "trained_weights.safetensors"} <= set(
        map(str, files)
    )
    assert damage(whole) is None
    for name in files:
        shutil.copytree(whole, folder)
        FAULTS[fault](folder / name)
        found = damage(folder)
        assert found is not None and (str(name) in found or str(name) == "manifest.json")
        shutil.rmtree(folder)


def test_the_newest_whole_checkpoint_is_resumed_from_and_the_others_are_named(tmp_path, run, caplog):
    settings = {"ema_decay": 0.5, "num_iterations": 2}
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "checkpoint-3" / "optimizer.pt")
    with pytest.raises(ValueError, match="checkpoint-3: optimizer.pt is damaged"):
        trainer_for(tmp_path, 4, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()  # of an older version, or killed while saving
    resumed = trainer_for(tmp_path, 3, save_total_limit=1, **settings)
    resumed.train(resume_from_checkpoint=True)
    told = [each.getMessage() for each in caplog.records if "Resuming from" in each.getMessage()]
    assert len(told) == 1
    for part in ("checkpoint-1", "checkpoint-3: optimizer.pt is damaged", "checkpoint-2: manifest.json is missing"):
        assert part in told[0]
    assert names(tmp_path) == ["checkpoint-3"]
    assert sorted(path.name for path in tmp_path.glob("_*-*")) == ["_damaged-checkpoint-2", "_damaged-checkpoint-3"]
    expected = load_file(run / "checkpoint-3" / "trained_weights.safetensors")
    assert all(
        torch.equal(expected[name], value) for name, value in weights(resumed.network).items() if name in expected
    )
    flip(tmp_path / "checkpoint-3" / "scheduler.pt")
    with pytest.raises(ValueError, match="there is no whole checkpoint. checkpoint-3: scheduler.pt is damaged"):
        trainer_for(tmp_path, 4, **settings).train(resume_from_checkpoint=True)


def brightness(images, hue=None, **kwargs):
    return images.float().mean(dim=(1, 2, 3)).tolist()


def labels(*rows, hue=0):
    return Dataset.from_dict({"label": rows, "hue": [hue] * len(rows)})


def other_real(distance="frechet"):
    return SubsetReplaceReward(features, features(real_images(100)), distance)


def adapter(**options):
    return LoraConfig(r=2, target_modules=["qkv", "fc1"], **options)


LORA = {"peft_config": adapter()}
PROMPTED = {"reward_funcs": [tiny_reward(), brightness], "train_dataset": labels(0, 1, 2)}
BEST = {"metric_for_best_model": "ode_distance_features"}
# settings of the run; what is changed, and the refusal
CHANGES = {
    "defaults": (
        {},
        [
            ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
            ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was 'constant' and is 'linear'"),
            ({"warmup_steps": 5}, "warmup_steps"),
            ({"optim": "sgd"}, "optim was"),
            ({"max_grad_norm": 0.1}, "max_grad_norm"),
            ({"seed": 1}, "seed was 42 and is 1"),
            ({"noise_level": 0.5}, "noise_level"),
            ({"num_subsets": 12}, "num_subsets was 6 and is 12"),
            ({"reference_set_size": 30}, "reference_set_size was 24 and is 30"),
            ({"loss_type": "rft", "ema_decay": 0.5}, "ema_decay was 0.0 and is 0.5; loss_type"),
            ({"reward_weights": [2.0]}, "subset_replace.weight was 1.0 and is 2.0"),
            ({"reward_funcs": [tiny_reward(), brightness]}, "reward_funcs was"),
            ({"reward_funcs": tiny_reward(credit="leave_one_in")}, "subset_replace.credit"),
            ({"reward_funcs": other_real()}, "subset_replace.real_statistics.features"),
            ({"reward_funcs": other_real("kernel")}, "subset_replace.real_statistics.features"),
            ({"train_dataset": labels(0, 0, 1)}, "train_dataset"),
        ],
    ),
    "columns": (PROMPTED, [({"train_dataset": labels(0, 1, 2, hue=3)}, "train_dataset")]),
    "adapter": (
        LORA,
        [
            ({"peft_config": adapter(lora_alpha=64)}, "peft_config.lora_alpha was 8 and is 64"),
            ({"peft_config": None}, "adapters"),
            ({"model": tiny_pipeline(1)}, "frozen_weights"),
        ],
    ),
    "initial model": ({"beta": 0.1}, [({"model": tiny_pipeline(1)}, "frozen_weights")]),
    "best model": (BEST, [({"num_eval_images": 30}, "num_eval_images was None and is 30")]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_settings_that_define_the_run_are_refused_by_name(tmp_path, case):
    settings, changes = CHANGES[case]
    trainer_for(tmp_path, 1, **settings).train()
    for change, message in changes:
        with pytest.raises(ValueError, match=f"is of a run with other settings: .*{message}"):
            trainer_for(tmp_path, 2, **{**settings, **change}).train(resume_from_checkpoint=True)
    same = trainer_for(tmp_path, 2, **settings)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 2


def test_settings_that_may_change_take_effect(tmp_path):
    trainer_for(tmp_path, 1, logging_steps=1).train()
    free = {"save_steps": 2, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "num_eval_images": 10}
    memory = {"per_device_train_batch_size": 3, "rollout_batch_size": 5, "reward_weights": [1.0]}
    resumed = trainer_for(tmp_path, 4, eval_samplers=["ode"], **free, **memory)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["1", "2", "4"]
    history = resumed.state.log_history
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 3, 4]
    assert [entry["step"] for entry in history if "eval_ode_distance_features" in entry] == [2, 4]


def test_another_number_of_processes_is_said(tmp_path, caplog, monkeypatch):
    def written_by_four(trainer, folder):
        return write_manifest(SimpleNamespace(args=SimpleNamespace(world_size=4), identity=trainer.identity), folder)

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "write_manifest", written_by_four)
        trainer_for(tmp_path, 1).train()
    trainer_for(tmp_path, 2).train(resume_from_checkpoint=True)
    assert "written by 4 processes, and this run has 1" in caplog.text


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("resume", [None, "checkpoint-1"], ids=["anew", "from an earlier checkpoint"])
def test_checkpoints_that_a_run_does_not_go_on_from_are_kept_unless_told(tmp_path, run, resume):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    settings = {"ema_decay": 0.5, "num_iterations": 2, "save_total_limit": 1}
    start = None if resume is None else str(tmp_path / resume)
    with pytest.raises(ValueError, match="holds checkpoint-3, which this run does not .*overwrite_output_dir=True"):
        trainer_for(tmp_path, 2, **settings).train(resume_from_checkpoint=start)
    assert names(tmp_path) == names(run) and all(damage(folder) is None for folder in tmp_path.glob("checkpoint-*"))
    trainer_for(tmp_path, 2, overwrite_output_dir=True, **settings).train(resume_from_checkpoint=start)
    assert names(tmp_path) == ["checkpoint-2"]
    trainer_for(tmp_path, 3, overwrite_output_dir=True, **settings).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_trainer_trains_again_in_its_own_folder_and_loses_no_checkpoint(tmp_path):
    trainer = trainer_for(tmp_path, 2)
    trainer.train()
    first = trainer.network.state_dict()["blocks.0.attn.qkv.weight"].clone()
    trainer.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    kept = load_pipeline(tmp_path / "_earlier-checkpoint-2").transformer
    assert torch.equal(weights(kept)["blocks.0.attn.qkv.weight"], first)
    assert_same_weights(load_pipeline(tmp_path / "checkpoint-2").transformer, trainer.network)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(load_pipeline(tmp_path / "_earlier-checkpoint-2").transformer, trainer.network)
    trainer.args.output_dir = str(tmp_path / "other")
    trainer_for(tmp_path / "other", 1).train()
    with pytest.raises(ValueError, match="holds checkpoint-1, which this run does not"):
        trainer.train()


class AtStep(TrainerCallback):
    """Calls a function after two updates, before the checkpoint is written."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.action()


def test_a_best_model_that_was_damaged_meanwhile_is_not_loaded(tmp_path):
    best = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True, **EVALUATE_EVERY_STEP}
    trainer = trainer_for(tmp_path, 3, eval_metrics={"rising": Rising()}, **best)
    weight = tmp_path / "checkpoint-1" / "transformer" / "diffusion_pytorch_model.safetensors"
    trainer.add_callback(AtStep(lambda: flip(weight)))
    with pytest.raises(ValueError, match="checkpoint-1: transformer/.* is damaged"):
        trainer.train()


@pytest.mark.parametrize("size", [20_000, 100_000], ids=["in the weights", "in the optimizer"])
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, size):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    trainer = trainer_for(tmp_path / "run", 3, ema_decay=0.5)
    trainer.add_callback(AtStep(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))))
    try:
        with pytest.raises(OSError, match="checkpoint-2 cannot be written: earlier checkpoints are whole: make room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert damage(tmp_path / "run" / "checkpoint-1") is None
    assert not list((tmp_path / "run").glob("*partial*"))
    trainer._save_checkpoint(trainer.model, None)  # the state in memory is the one after two updates
    whole, resumed = trainer_for(tmp_path / "whole", 3, ema_decay=0.5), trainer_for(tmp_path / "run", 3, ema_decay=0.5)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(resumed.network, whole.network)


def test_a_folder_that_vanishes_comes_back_with_the_next_checkpoint_and_one_that_is_a_file_is_refused(tmp_path):
    trainer = trainer_for(tmp_path / "run", 2)
    trainer.add_callback(AtStep(lambda: shutil.rmtree(tmp_path / "run")))
    trainer.train()
    assert damage(tmp_path / "run" / "checkpoint-2") is None
    trainer = trainer_for(tmp_path / "file", 1)
    shutil.rmtree(tmp_path / "file", ignore_errors=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="File exists: .*file"):
        trainer.train()


def test_two_runs_do_not_train_in_one_folder(tmp_path):
    def second():
        with pytest.raises(ValueError, match="another process trains in output_dir"):
            trainer_for(tmp_path, 1, overwrite_output_dir=True).train()
        with pytest.raises(ValueError, match="another process trains in output_dir"):
            trainer_for(tmp_path, 3).train(resume_from_checkpoint=True)

    first = trainer_for(tmp_path, 2)
    first.add_callback(AtStep(second))
    first.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    trainer_for(tmp_path, 3).train(resume_from_checkpoint=True)
