# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What tests watch and compare of a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

SAVE_EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


EVALUATE_EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


class Rising:
    """A metric that is worse at every evaluation."""

    count = 0

    def reset(self):
        pass

    def update(self, images, conditions):
        pass

    def compute(self):
        self.count += 1
        return float(self.count)


def calls_of(owner, name):
    """A list to which every further call of a method adds its arguments and result."""
    calls, method = [], getattr(owner, name)

    def noted(*args, **kwargs):
        calls.append((args, method(*args, **kwargs)))
        return calls[-1][1]

    setattr(owner, name, noted)
    return calls


def weights(model):
    """Copies of a network's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logged(trainer, key):
    """Every value of a key that a run has logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_weights(first, second):
    """Asserts that two networks have the same parameters, to the last bit."""
    expected = weights(second)
    for name, value in weights(first).items():
        assert torch.equal(value, expected[name]), name


def first_gradients(trainer):
    """Trains, and returns the gradients of the first update."""
    found = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return found[0]


def stop_in(trainer, owner, name, step, call=1, number=signal.SIGTERM):
    """Sends a signal at the start of a method's `call`-th call after `step` updates."""
    method, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        if trainer.state.global_step == step:
            calls.append(args)
            if len(calls) == call:
                signal.raise_signal(number)
        return method(*args, **kwargs)

    setattr(owner, name, signalled)


def launch(*command, processes=2, **environment):
    """Runs a script, or `-m` and a module, in several processes, and returns the completed process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += [str(Path(__file__).with_name("launched.py"))]
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [*launcher, *map(str, command)]
    return subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=120)
