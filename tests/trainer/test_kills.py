# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A run that saves after every update is killed at random moments: nothing is lost, and the end is the same."""

import os
import random
import signal
import time

import pytest
import torch

from tests.helpers import tiny_trainer
from tests.runs import SAVE_EVERY_STEP, weights
from trl_distreward.trainer.resuming import damage

SETTINGS = {"reference_update": "rolling", "ema_decay": 0.5, "num_iterations": 2, "save_total_limit": 2}


def train(folder, steps, resume=None):
    trainer = tiny_trainer(folder, max_steps=steps, **SETTINGS, **SAVE_EVERY_STEP)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.network), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def newest_whole(folder):
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if damage(path) is None]
    return max(steps, default=0)


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    kills, folder = int(os.environ.get("KILLS", "50")), tmp_path / "killed"
    steps, draw, reached, writing = 4 * kills, random.Random(0), 0, 0
    started = time.monotonic()
    expected, losses = train(tmp_path / "whole", steps)
    span = 8 * (time.monotonic() - started) / steps  # seconds of 8 updates
    for _ in range(kills):
        child = os.fork()
        if not child:
            try:
                train(folder, steps, resume=reached > 0)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, reached = reached, newest_whole(folder)
        assert reached >= before, f"step {before} is lost"
        writing += (folder / "_partial-checkpoint").exists()
    found, again = train(folder, steps, resume=reached > 0)
    assert again == losses and all(torch.equal(found[name], value) for name, value in expected.items())
    assert writing  # else no kill came while a checkpoint was written
