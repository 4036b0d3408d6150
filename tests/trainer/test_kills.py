# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A run that saves after every update is killed at random moments: nothing is lost, and the end is the same."""

import os
import random
import signal
import time

import pytest
from transformers import TrainerCallback

from tests.helpers import tiny_trainer
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, logged
from trl_distreward.trainer.resuming import damage

SETTINGS = {"reference_update": "rolling", "ema_decay": 0.5, "num_iterations": 2, "save_total_limit": 2}


class Begun(TrainerCallback):
    """Tells the parent process that training begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, *args, **kwargs):
        os.write(self.pipe, b"!")


def train(folder, steps, resume=None, pipe=None):
    trainer = tiny_trainer(folder, max_steps=steps, **SETTINGS, **SAVE_EVERY_STEP)
    if pipe is not None:
        trainer.add_callback(Begun(pipe))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def newest_whole(folder):
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if damage(path) is None]
    return max(steps, default=0)


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    kills, folder = int(os.environ.get("KILLS", "50")), tmp_path / "killed"
    steps, draw, reached, writing = 2 * kills, random.Random(0), 0, 0
    whole = train(tmp_path / "whole", steps)
    span = 4 * whole.state.log_history[-1]["train_runtime"] / steps  # seconds of 4 updates
    for _ in range(kills):
        begun, pipe = os.pipe()
        child = os.fork()
        if not child:
            try:
                train(folder, steps, reached > 0, pipe)
            finally:
                os._exit(0)
        os.close(pipe)
        os.read(begun, 1)
        os.close(begun)
        time.sleep(draw.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, reached = reached, newest_whole(folder)
        assert reached >= before, f"step {before} is lost"
        writing += (folder / "_partial-checkpoint").exists()
    end = train(folder, steps, reached > 0)
    assert logged(end, "loss") == logged(whole, "loss")
    assert_same_weights(end.network, whole.network)
    assert writing  # else no kill came while a checkpoint was written
