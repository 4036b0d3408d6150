# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""An estimator from outside: a subclass and one line in the registry."""

from dataclasses import dataclass

import pytest
import torch

from tests.helpers import tiny_config, tiny_trainer
from tests.runs import assert_same_weights, logged, weights
from trl_distreward.trainer.estimators import ESTIMATORS, Estimator


@dataclass
class WholeRollout:
    rollout: object
    advantages: torch.Tensor

    def micro_batches(self, size, processes):
        weights = torch.full((len(self.advantages),), 1 / len(self.advantages))
        yield {"x": self.rollout.sample, "cond": self.rollout.cond, "a": self.advantages, "weights": weights}, True

    def state_dict(self):
        raise TypeError("one update per rollout")


class PullTowardsGoodSamples(Estimator):
    """Moves the velocity at t = 0 along the sample, by its advantage and its place in the run."""

    calls = 0

    def rollout(self, model, slots, step):
        return self.sampler(model, slots, step)

    def prepare(self, rollout, rewards):
        self.calls += 1
        advantages = self.compute_advantages(rewards).expand(rollout.slots.shape).flatten().float()
        return WholeRollout(rollout, advantages / self.calls)

    def loss(self, model, micro_batch):
        x, weights = micro_batch["x"], micro_batch["weights"]
        velocity = self.trainer.velocity(model, x, torch.zeros(len(x)), micro_batch["cond"])
        fit = micro_batch["a"] * (velocity + x).square().flatten(1).mean(1)
        return (fit * weights).sum(), {"fit": fit}

    def num_passes(self):
        return self.args.num_subsets * self.args.replace_size

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_an_estimator_from_outside_trains_and_resumes_exactly(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="loss_type='pull' is unknown: choose one of grpo"):
        tiny_config(tmp_path, loss_type="pull")
    monkeypatch.setitem(ESTIMATORS, "pull", PullTowardsGoodSamples)
    settings = {"loss_type": "pull", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    before = weights(whole.network)
    whole.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(whole.network).items())
    assert len(logged(whole, "fit")) == 4 and whole.estimator.calls == 4
    resumed = tiny_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(whole.network, resumed.network)
    assert logged(resumed, "fit") == logged(whole, "fit") and resumed.estimator.calls == 4
