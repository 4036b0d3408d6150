# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A signal stops a run halfway through anything, and what is resumed is the run that was not stopped."""

import signal

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers import tiny_merge_trainer, tiny_pool, tiny_trainer
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, calls_of, logged, stop_in
from trl_distreward.trainer import stopping

# place, step, settings
PLACES = {
    "a rollout": (lambda t: (t.estimator, "rollout"), 2, {"reference_update": "rolling", "ema_decay": 0.5}),
    "a micro-batch": (lambda t: (t.estimator, "loss"), 2, {"reference_update": "rolling"}),
    "the first update of a rollout": (lambda t: (t.estimator, "loss"), 3, {"num_iterations": 3, "epsilon": 0.2}),
    "a later update of a rollout": (lambda t: (t.estimator, "loss"), 4, {"num_iterations": 3, "epsilon": 0.2}),
    "a reference set": (lambda t: (t.reference_set, "refresh"), 2, {"reference_refresh_steps": 2}),
    "an evaluation": (lambda t: (t, "evaluate"), 2, {"eval_strategy": "steps", "eval_steps": 2}),
    "a rollout of rejection sampling": (lambda t: (t.estimator, "rollout"), 2, {"loss_type": "rft"}),
    "transport": (lambda t: (t.rewards.of_sets[0], "score"), 2, {"loss_type": "transport", "sampler": "ode"}),
    "a rollout of nft": (lambda t: (t.estimator, "rollout"), 2, {"loss_type": "nft", "old_policy_decay": 0.9}),
    "backpropagation": (lambda t: (t.estimator, "loss"), 2, {"loss_type": "backprop", "reference_update": "rolling"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_stopped_halfway_resumes_as_if_it_had_not_been(tmp_path, place):
    where, step, settings = PLACES[place]
    whole = tiny_trainer(tmp_path / "whole", max_steps=6, **settings)
    whole.train()
    stopped = tiny_trainer(tmp_path / "stopped", max_steps=6, **settings)
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    stop_in(stopped, *where(stopped), step)
    stopped.train()
    assert stopped.interrupted and stopped.state.global_step == step
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = tiny_trainer(tmp_path / "stopped", max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.interrupted and resumed.state.global_step == 6
    assert_same_weights(resumed.network, whole.network)
    for key in ("reward", "reference_distance/features", "loss"):
        assert logged(resumed, key) == logged(whole, key)
    if whole.ema is not None:
        assert all(torch.equal(resumed.ema.averages[name], value) for name, value in whole.ema.averages.items())


@pytest.mark.parametrize("method", ["cma", "emanet"])
def test_a_merge_that_was_stopped_at_a_candidate_resumes_as_if_it_had_not_been(tmp_path, method):
    def trainer(name):
        return tiny_merge_trainer(tmp_path / name, pool, method=method, max_steps=4)

    pool = tiny_pool(tmp_path)
    whole, stopped = trainer("whole"), trainer("stopped")
    whole.train()
    stop_in(stopped, stopped.judge, "judge_set", 2, call=3)
    stopped.train()
    assert stopped.interrupted and stopped.state.global_step == 2
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.coefficients, whole.coefficients)
    assert logged(resumed, "reward") == logged(whole, "reward")


@pytest.mark.parametrize("log_samples", [False, True])
def test_a_run_that_was_stopped_before_its_first_update_leaves_nothing_and_can_begin_again(tmp_path, log_samples):
    trainer = tiny_trainer(tmp_path, log_samples=log_samples, rollout_batch_size=4)
    decode = trainer.policy.decode
    stop_in(trainer, trainer.policy, "decode", 0, number=signal.SIGINT)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 0 and get_last_checkpoint(str(tmp_path)) is None
    trainer.policy.decode = decode
    trainer.train()
    assert not trainer.interrupted and trainer.state.global_step == 2


def test_a_stopped_run_does_little_before_it_leaves(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, per_device_eval_batch_size=2)
    stop_in(trainer, trainer.reference_set, "refresh", 0)
    decoded = calls_of(trainer.policy, "decode")
    trainer.train()
    assert sum(len(x) for (x,), _ in decoded) == 2  # of 24


def test_the_checkpoint_of_a_stop_counts_once(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=5, **SAVE_EVERY_STEP)
    stop_in(trainer, trainer.estimator, "rollout", 2)
    calls = calls_of(trainer, "_save_checkpoint")
    trainer.train()
    assert len(calls) == 2  # after each update


def test_a_checkpoint_that_a_run_resumed_from_is_not_written_again(tmp_path):
    tiny_trainer(tmp_path, max_steps=1, **SAVE_EVERY_STEP).train()
    trainer = tiny_trainer(tmp_path, max_steps=2, **SAVE_EVERY_STEP)
    stop_in(trainer, trainer.estimator, "rollout", 1)
    calls = calls_of(trainer, "_save_checkpoint")
    trainer.train(resume_from_checkpoint=True)  # a kill would hit it between its deletion and its replacement
    assert trainer.interrupted and calls == []


def test_a_second_signal_leaves_at_once_but_not_one_that_a_launcher_passes_on(monkeypatch):
    now, received = [100.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        stop = stopping.StopOnSignal()
        stop.__enter__()
        for _ in range(2):  # by the terminal, and by the launcher
            signal.raise_signal(signal.SIGINT)
        assert stop.requested and received == []
        now[0] += 3
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)  # the handler of before is back
        assert len(received) == 2
    finally:
        signal.signal(signal.SIGINT, before)
