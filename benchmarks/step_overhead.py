# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Where a training step of the digits setup spends its time, and whether memory depends on the number of sampling steps.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

Overhead is the time of a step outside feature extraction and network evaluations (forward, and backward in the
update). Memory is what autograd holds for the backward pass at its peak in one update.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results import write_table
from runs import build_trainer, held_for_backward
from torch import nn

from trl_distreward import DistributionRewardTrainer, FeatureStatistics, SiTPipeline
from trl_distreward.metrics import extract_features

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import DigitClassifier, Digits, new_sit  # noqa: E402


class Clock:
    """Seconds inside wrapped functions; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - started

        return timed


def build(folder: str, updates: int, **settings: Any) -> DistributionRewardTrainer:
    """A trainer of the digits setup with random weights."""
    torch.manual_seed(0)
    model, judge = new_sit(), DigitClassifier(32, F.relu)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    SiTPipeline(model).save_pretrained(folder)
    images = torch.randint(0, 256, (1200, 1, 8, 8)).to(torch.uint8)
    real = FeatureStatistics.from_features(extract_features(judge.last_features, images))
    digits = Digits(Path(folder), images, {"asked": judge.last_features}, {"asked": real}, judge, real, {})
    return build_trainer(digits, folder, loss_type="grpo", max_steps=updates, logging_steps=1000, **settings)


def measure_seconds(updates: int) -> tuple[float, float]:
    """Seconds of a step, and of its network evaluations and feature extraction, without the reference set."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, updates)
        inside, steps = Clock(), Clock()
        trainer.policy.velocity = inside.wrap(trainer.policy.velocity)
        (reward,) = trainer.rewards.of_sets
        reward.extract = inside.wrap(reward.extract)
        trainer.accelerator.backward = inside.wrap(trainer.accelerator.backward)
        refresh = trainer.reference_set.refresh

        def uncounted(*args: Any) -> None:  # once, in the first step
            before, started = inside.seconds, time.perf_counter()
            refresh(*args)
            inside.seconds = before
            steps.seconds -= time.perf_counter() - started

        trainer.reference_set.refresh = uncounted
        trainer.training_step = steps.wrap(trainer.training_step)
        trainer.train()
    return steps.seconds / updates, inside.seconds / updates


def measure_memory(num_inference_steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, 1, num_inference_steps=num_inference_steps, num_subsets=32)
        with held_for_backward() as held:
            trainer.train()
    return held.most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    step, inside = measure_seconds(args.updates)
    values = {"seconds": step, "seconds inside": inside, "overhead": 1 - inside / step}
    values |= {f"MiB held, {steps} sampling steps": measure_memory(steps) for steps in (10, 50)}
    rows = [{"metric": metric, "value": value} for metric, value in values.items()]
    for metric, value in values.items():
        print(f"{metric:28} {value:.3f}")
    write_table(args.output, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
