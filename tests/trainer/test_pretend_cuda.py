# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The whole path of training on a GPU that is not there: see `tests/pretend_cuda.py`."""

import weakref

import pytest
import torch
from peft import LoraConfig

from tests.helpers import real_images, tiny_merge_trainer, tiny_trainer
from tests.pretend_cuda import pretend_cuda
from trl_distreward import DistributionRewardTrainer, FeatureStatistics, LogSamplesCallback, SubsetReplaceReward
from trl_distreward.trainer import backprop, rollouts
from trl_distreward.trainer.dry_run import dry_run
from trl_distreward.trainer.judged import Judged

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BACKPROP = {"loss_type": "backprop", "num_subsets": 6, "backprop_steps": "2"}
MODES = {
    "bf16": {"bf16": True, "ema_decay": 0.5, "activation_checkpointing": True},
    "off-policy": {
        "num_iterations": 2,
        "offload_trajectories": True,
        "ratio_normalization": True,
        "step_weighting": "noise",
        "log_steps": True,
    },
    "rft": {"loss_type": "rft"},
    "best of n": {"best_of_n": 2, "selection": "top_bottom", "top_advantage_quantile": 0.3},
    "rolling": {"reference_update": "rolling", "beta": 0.1, "log_reward_diagnostics": True},
    "automatic": {"reference_refresh_steps": "auto", "sde_window_size": 2, "sde_window": "random"},
    "adapter": {"peft_config": LoraConfig, "beta": 0.1},
    "slices": {"eval_solver": "heun", "decode_batch_size": 2, "rollout_batch_size": 3},
    "backprop": {
        "loss_type": "backprop",
        "top_advantage_quantile": 0.25,
        "num_subsets": 2,
        "backprop_steps": "2",
        "offload_trajectories": True,
        "checkpoint_steps": True,
    },
    "draws": {
        "loss_type": "backprop",
        "top_advantage_quantile": 0.25,
        "num_subsets": 2,
        "backprop_draws": 2,
        "beta": 0.1,
    },
}


def options(settings):
    settings = dict(settings)
    if "peft_config" in settings:
        settings["peft_config"] = LoraConfig(r=2)
    torch.manual_seed(0)
    return settings


def judged(log):
    """What is logged of images and rewards."""
    return {k: v for k, v in log.items() if ("distance" in k or "reward" in k) and "seconds" not in k}


def assert_trains_as_on_a_cpu(folder, monkeypatch, settings):
    on_cpu = tiny_trainer(folder / "cpu", **options(settings))
    on_cpu.train()
    with monkeypatch.context() as patch, pretend_cuda(patch):
        trainer = tiny_trainer(folder / "cuda", **options(settings), use_cpu=False)
        trainer.add_callback(LogSamplesCallback(trainer, freq=1))
        assert trainer.args.device == trainer.accelerator.device == torch.device("cuda", 0)
        trainer.train()
        assert all(p.is_cuda for p in trainer.network.parameters())
        assert all(v.is_cuda for r in trainer.distribution_rewards for v in r.features.values())
    weights = dict(on_cpu.network.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.network.named_parameters())
    for log, expected in zip(trainer.state.log_history, on_cpu.state.log_history, strict=True):
        assert judged(log) == pytest.approx(judged(expected), rel=1e-9)


def test_a_run_is_the_same_and_leaves_no_tensor_behind(tmp_path, monkeypatch):
    assert_trains_as_on_a_cpu(tmp_path, monkeypatch, {"max_steps": 1, "bf16": True, "ema_decay": 0.5, **EVERY_STEP})


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_same(tmp_path, monkeypatch, mode):
    assert_trains_as_on_a_cpu(tmp_path, monkeypatch, {**MODES[mode], **EVERY_STEP})


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"offload_trajectories": True, "ratio_normalization": True}])
def test_what_resumes_is_put_back_where_it_was(tmp_path, monkeypatch, settings):
    """In the middle of a generation, with the rollout's states in the checkpoint."""
    settings = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings}
    with pretend_cuda(monkeypatch):
        whole = tiny_trainer(tmp_path, use_cpu=False, **options(settings))
        whole.train()
        expected = {name: value.detach().clone() for name, value in whole.network.named_parameters()}
        resumed = tiny_trainer(tmp_path, use_cpu=False, **options(settings))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert all(torch.equal(value, expected[name]) for name, value in resumed.network.named_parameters())


@pytest.mark.slow
def test_coefficients_are_searched_for(tmp_path, monkeypatch):
    expected = tiny_merge_trainer(tmp_path)
    expected.train()
    with monkeypatch.context() as patch, pretend_cuda(patch):
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, 2**30))
        trainer = tiny_merge_trainer(tmp_path, use_cpu=False)
        trainer.train()
    for log, other in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        assert judged(log) == pytest.approx(judged(other), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss_type": "backprop", "top_advantage_quantile": 0.25, "num_subsets": 2}])
def test_what_a_run_takes_is_measured_by_the_devices_counters(tmp_path, monkeypatch, settings):
    counters = {"memory_allocated": 1000, "max_memory_allocated": 5000, "memory_reserved": 0}
    with pretend_cuda(monkeypatch) as device:
        for name, value in counters.items():
            monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
        prediction = dry_run(tiny_trainer(tmp_path, use_cpu=False, **settings))
    assert prediction.device == "pretended" and prediction.capacity == 2**30 and prediction.fits
    assert device.waits["synchronize"] > 10  # or the clock would stop before the device does


def test_what_a_gpu_would_not_take_is_an_error(monkeypatch):
    with pretend_cuda(monkeypatch) as device:
        there, here = torch.ones(3, device="cuda:0"), torch.ones(3)
        assert (there * 2 + torch.tensor(1.0)).device.type == "cuda" and there[torch.tensor([0])].is_cuda
        for wrong in (lambda: there + here, lambda: here[torch.tensor([0]).to("cuda:0")], there.numpy):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda:0", generator=torch.Generator())
        device.waits.clear()
        assert (there / 2).isfinite().all().ndim == 0 and not device.waits
        assert there.sum().item() == 3 and there.tolist() == [1, 1, 1]
        here.to("cuda:0", non_blocking=True)
        here.pin_memory().to("cuda:0", non_blocking=True)
        assert device.waits == {"_local_scalar_dense": 1, "to host": 1, "to device": 1}


def waits_of(trainer, device, action):
    device.waits.clear()
    result = action()
    return result, +device.waits


class Pixels(torch.nn.Module):
    def forward(self, images):
        return images.float().flatten(1) / 255  # (B, 16)


def test_more_slices_and_pairs_wait_no_more_for_the_device(tmp_path, monkeypatch):
    """Neither between the parts of a rollout, nor between a slice of images and its features, nor in an update."""
    counts = []
    with pretend_cuda(monkeypatch) as device:
        for settings in ({}, {"rollout_batch_size": 3, "decode_batch_size": 1, "per_device_train_batch_size": 2}):
            reward = SubsetReplaceReward(Pixels(), FeatureStatistics.from_features(Pixels()(real_images())))
            trainer = tiny_trainer(tmp_path, reward_funcs=reward, use_cpu=False, **settings)
            trainer.network.to(trainer.accelerator.device)
            slots = torch.arange(12).view(6, 2).to(trainer.accelerator.device)
            device.waits.clear()
            batch, _ = trainer.rollouts.generate(trainer.network, slots, step=0)
            rollout = +device.waits
            device.waits.clear()
            for micro, _ in trainer._micro_batches(batch):
                trainer.accelerator.backward(trainer.compute_loss(trainer.network, micro))
            counts.append((rollout, +device.waits))
    assert counts[0] == counts[1]
    rollout, update = counts[0]
    assert rollout == {"to host": 1, "_local_scalar_dense": 1}  # the slots, and whether all samples are finite
    assert not update


@pytest.mark.parametrize("settings", [{}, {"loss_type": "rft"}, BACKPROP], ids=["pairs", "rft", "backprop"])
def test_offloaded_trajectories_leave_the_device_one_by_one(tmp_path, monkeypatch, settings):
    settings = {"max_steps": 1, "top_advantage_quantile": 0.25, "rollout_batch_size": 2, **settings}
    there, waiting = [], []
    real = rollouts.sample

    def sample(*args, **kwargs):
        waiting.append(sum(kept() is not None for kept in there))
        trajectory = real(*args, **kwargs)
        there.extend(map(weakref.ref, [trajectory.sample, *trajectory.states.values()]))
        return trajectory

    for module in (rollouts, backprop):
        monkeypatch.setattr(module, "sample", sample)
    with pretend_cuda(monkeypatch):
        trainer = tiny_trainer(tmp_path, use_cpu=False, offload_trajectories=True, **settings)
        trainer.train()
    assert len(waiting) == 6 and max(waiting) <= 1


@pytest.mark.parametrize("settings", [{}, BACKPROP], ids=["pairs", "backprop"])
def test_a_skipped_generation_leaves_its_time_to_no_other_and_gradients_on(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(Judged, "finite", False)
    nothing = DistributionRewardTrainer._no_update
    with_gradients = []  # float16 back-propagates a loss of 0

    def no_update(trainer):
        with_gradients.append(torch.is_grad_enabled())
        return nothing(trainer)

    monkeypatch.setattr(DistributionRewardTrainer, "_no_update", no_update)
    with pretend_cuda(monkeypatch):
        trainer = tiny_trainer(tmp_path, use_cpu=False, max_steps=1, **{"top_advantage_quantile": 0.25, **settings})
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "skipped_updates" in log]
        assert log["seconds/rollout"] > 0 and log["seconds/reward"] > 0
        assert trainer.rollouts.judge.stopwatch.read() == 0
    assert with_gradients == [True]
