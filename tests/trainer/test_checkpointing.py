# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A run that was interrupted and resumed is the run that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers import features, logged, real_images, tiny_sit, tiny_trainer, weights
from trl_distreward import FeatureStatistics, SiTPipeline, SubsetReplaceReward, load_pipeline

# (settings, steps at which the run is interrupted)
CASES = {
    "rolling with average and decay": (
        {"reference_update": "rolling", "ema_decay": 0.5, "lr_scheduler_type": "linear"},
        [1, 3],
    ),
    "before and after a refresh": ({"reference_refresh_steps": 3}, [2, 3, 4]),
    "automatic refresh": ({"reference_refresh_steps": "auto", "refresh_drift": 0.3}, [2, 3]),
    "in the middle of a generation": ({"num_iterations": 4, "epsilon": 0.2, "beta": 0.05}, [1, 3, 4, 5]),
    "in a second epoch": ({"max_steps": -1, "num_train_epochs": 3}, [2, 3]),
    "normalized ratios": ({"num_iterations": 2, "ratio_normalization": True}, [1]),
    "windows, best of two": ({"sde_window_size": 2, "sde_window": "random", "best_of_n": 2}, [2]),
    "rejection sampling": ({"loss_type": "rft"}, [2]),
    "adapter": ({"lora": True, "reference_update": "rolling", "ema_decay": 0.5}, [2]),
    "adapter in the middle of a generation": ({"lora": True, "num_iterations": 2, "beta": 0.1}, [1]),
}


def trainer_for(output_dir, lora=False, **settings):
    peft_config = LoraConfig(r=2, target_modules=["qkv", "fc1"]) if lora else None
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    return tiny_trainer(output_dir, peft_config=peft_config, **{**defaults, **settings})


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, case):
    settings, interruptions = CASES[case]
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    expected = weights(whole.network)
    for step in interruptions:
        resumed = trainer_for(tmp_path / f"resumed-{step}", **settings)
        torch.manual_seed(1000 + step)  # nothing may ride on the global generator
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step
        for name, value in weights(resumed.network).items():
            assert torch.equal(value, expected[name]), (step, name)
        rewards, distances = "reward", "reference_distance/features"
        for key in (rewards, distances, "loss"):
            assert logged(resumed, key) == logged(whole, key), (step, key)
        if whole.ema is not None:
            assert all(torch.equal(resumed.ema.averages[n], v) for n, v in whole.ema.averages.items())


def two_spaces():
    extractors = {"features": features, "squares": lambda x: features(x) ** 2}
    real = {name: FeatureStatistics.from_features(extract(real_images())) for name, extract in extractors.items()}
    return SubsetReplaceReward(extractors, real)


def test_scales_of_distances_are_the_runs_own(tmp_path):
    def rewards(folder, reward, seed=0, resume=None):
        trainer = trainer_for(tmp_path / folder, reward_funcs=reward, seed=seed, max_steps=3, save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return logged(trainer, "reward")

    alone, reward = rewards("alone", two_spaces()), two_spaces()
    other = rewards("other", reward, seed=1)
    assert rewards("again", reward) == alone  # as if the reward were new
    assert rewards("resumed", reward, seed=1, resume=str(tmp_path / "other" / "checkpoint-2")) == other


def test_resuming_a_finished_run_keeps_its_average(tmp_path):
    whole = trainer_for(tmp_path, ema_decay=0.5, max_steps=2)
    whole.train()
    again = trainer_for(tmp_path, ema_decay=0.5, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(again.ema.averages[name], value) for name, value in whole.ema.averages.items())


@pytest.mark.parametrize("max_steps", [2, 3])  # at the end of an epoch, and within one
def test_resuming_a_finished_run_changes_nothing(tmp_path, max_steps):
    settings = {"max_steps": max_steps, "eval_strategy": "steps", "eval_steps": 1}
    whole = trainer_for(tmp_path, **settings)
    assert whole.steps_per_epoch == 2
    whole.train()
    again = trainer_for(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == max_steps
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == f"checkpoint-{max_steps}"
    assert all(torch.equal(value, weights(whole.network)[n]) for n, value in weights(again.network).items())
    assert again.num_images == whole.num_images > 0
    assert again.run_record.evaluations == whole.run_record.evaluations != []
    features = [trainer.reward_funcs[0].features["features"] for trainer in (whole, again)]
    assert torch.equal(*features)
    longer = trainer_for(tmp_path, **{**settings, "max_steps": max_steps + 1})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == max_steps + 1 and longer.num_images > whole.num_images


def test_checkpoints_that_hold_the_model_alone_are_not_resumed_from(tmp_path):
    trainer_for(tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="has no diffusion_state.pt: .*save_only_model=True.*as its model"):
        trainer_for(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("size", [20, 30])
def test_resuming_with_another_size_of_the_reference_set_is_refused(tmp_path, size):
    trainer_for(tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match=f"reference set has 24 images, and reference_set_size={size}: resume with"):
        trainer_for(tmp_path, max_steps=2, reference_set_size=size).train(resume_from_checkpoint=True)


def test_resuming_with_another_extractor_is_refused(tmp_path):
    class Extractor(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.name, self.resize = "mine", None
            self.weight = torch.nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)))

        def forward(self, images):
            return images.flatten(1).float() @ self.weight / 255

    def trainer(seed, **settings):
        extractor = Extractor(seed)
        real = FeatureStatistics.from_features(extractor(real_images()).detach())
        return trainer_for(tmp_path, reward_funcs=SubsetReplaceReward(extractor, real), **settings)

    trainer(0, max_steps=1).train()
    trainer(0, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="features 'features' are of the extractor .*mine.*, and this reward's is"):
        trainer(1, max_steps=3).train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for folder in ("none", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no folder with a trainer_state.json: name a checkpoint-"):
            trainer_for(tmp_path).train(resume_from_checkpoint=str(folder))


def test_means_of_a_generation_are_read_as_they_were_kept_before(tmp_path):
    settings = {"num_iterations": 2, "ratio_normalization": True}
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    state = torch.load(checkpoint / "process_state_0.pt", weights_only=True)
    buffer = state["buffer"]
    buffer["old_means"] = torch.stack([buffer["old_means"][step] for step in buffer["steps"]], dim=1)
    torch.save(state, checkpoint / "process_state_0.pt")
    resumed = trainer_for(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, weights(whole.network)[n]) for n, value in weights(resumed.network).items())


def test_resuming_with_another_model_is_refused(tmp_path):
    trainer_for(tmp_path, ema_decay=0.5, max_steps=1, lora=True).train()
    with pytest.raises(ValueError, match="trained with other parameters"):
        trainer_for(tmp_path, ema_decay=0.5, max_steps=2).train(resume_from_checkpoint=True)
    trainer_for(tmp_path / "small", max_steps=1).train()
    larger = trainer_for(tmp_path / "small", model=SiTPipeline(tiny_sit(hidden_size=32)), max_steps=2)
    with pytest.raises(ValueError, match="checkpoint-1 do not fit the network: resume with the model"):
        larger.train(resume_from_checkpoint=True)


def test_checkpoints_are_pipelines_and_old_ones_go(tmp_path):
    trainer = trainer_for(tmp_path, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    last = load_pipeline(tmp_path / "checkpoint-6").transformer
    assert all(torch.equal(p, weights(trainer.network)[n]) for n, p in last.named_parameters())


@pytest.mark.parametrize("moment", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_failure_while_saving_leaves_the_earlier_checkpoint_whole(tmp_path, moment):
    trainer = trainer_for(tmp_path, max_steps=3)
    original = getattr(trainer, moment)

    def full_disk(path, *args, **kwargs):
        original(path, *args, **kwargs)
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")

    setattr(trainer, moment, full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        trainer.train()
    assert "earlier ones are intact" in "".join(error.value.__notes__)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    resumed = trainer_for(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_checkpoint_in_the_middle_of_a_generation_knows_its_processes(tmp_path):
    trainer = trainer_for(tmp_path, num_iterations=2, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="by 3 processes and cannot be resumed on 1"):
        trainer.load_process_state({**trainer.process_state(), "processes": 3})


@pytest.mark.parametrize(
    "settings",
    [{"save_strategy": "no"}, {"save_strategy": "best", "metric_for_best_model": "ode_distance_features"}],
    ids=lambda settings: settings["save_strategy"],
)
def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path, settings):
    if settings["save_strategy"] == "best":  # whose evaluation comes with the signal, and keeps one checkpoint
        settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **settings}
        settings |= {"save_total_limit": 1, "greater_is_better": False, "learning_rate": 1e-7}
    trainer = trainer_for(tmp_path, max_steps=50, **settings)

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Terminate())
    handler = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 3
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) == handler


KILLED = """
import sys
from pathlib import Path
from tests.helpers import logged, tiny_trainer, weights
trainer = tiny_trainer(Path(sys.argv[1]), max_steps=100000, save_strategy="steps", save_steps=1, save_total_limit=2,
                       ema_decay=0.5)
print("ready", flush=True)
trainer.train()
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_checkpoint_that_resumes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for attempt in range(6):
        output = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(output)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "ready"
        while get_last_checkpoint(str(output)) is None:
            time.sleep(0.01)
        time.sleep(0.037 * attempt)
        process.kill()
        process.wait()
        resumed = trainer_for(output, ema_decay=0.5, max_steps=10**9)
        last = int(get_last_checkpoint(str(output)).rsplit("-", 1)[1])
        resumed.args.max_steps = last + 1
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == last + 1
