# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Where a step of the digits setup spends its time, and how the update's memory depends on the number of time steps.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

Time: network evaluations (forward, and backward in the update) and feature extraction are counted; what is left of a
step is overhead. Memory: bytes that autograd holds for the backward pass, at their peak over an update.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from held import held_for_backward
from runs import new_sit
from torch import nn

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    SiTPipeline,
    SubsetReplaceReward,
)


class Extractor(nn.Module):
    """A convolutional network of the digits example's size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float() / 127.5 - 1)


class Clock:
    """Seconds spent inside wrapped functions; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function):
        def timed(*args, **kwargs):
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - started

        return timed


def build(num_inference_steps: int, updates: int, output_dir: str, **kwargs) -> DistributionRewardTrainer:
    torch.manual_seed(0)
    model = new_sit()
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    extractor = Extractor()
    real = torch.randint(0, 256, (1200, 1, 8, 8)).to(torch.uint8)
    with torch.no_grad():
        statistics = FeatureStatistics.from_features(extractor(real))
    settings = {
        "output_dir": output_dir,
        "max_steps": updates,
        "reference_set_size": 1000,
        "num_subsets": 256,
        "replace_size": 1,
        "reference_update": "rolling",
        "top_advantage_quantile": 1.0,
        "num_inference_steps": num_inference_steps,
        "last_step_size": None,
        "noise_level": 0.7,
        "ema_decay": 0.9,
        "per_device_train_batch_size": 256,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DistributionRewardTrainer(
        SiTPipeline(model),
        SubsetReplaceReward(extractor, statistics),
        DiffusionDistributionConfig(**{**settings, **kwargs}),
    )


def measure_overhead(updates: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(10, updates, folder)
        clock, steps = Clock(), Clock()
        trainer.policy.velocity = clock.wrap(trainer.policy.velocity)
        reward = trainer.reward_funcs[0]
        reward.extract = clock.wrap(reward.extract)
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = clock.wrap(backward)
        refresh = trainer._refresh_reference

        def uncounted(model):  # once, before the first step
            before = clock.seconds, time.perf_counter()
            refresh(model)
            clock.seconds = before[0]
            steps.seconds -= time.perf_counter() - before[1]

        trainer._refresh_reference = uncounted
        trainer.training_step = steps.wrap(trainer.training_step)
        trainer.train()
    return {"step": steps.seconds / updates, "network and features": clock.seconds / updates}


def measure_memory(num_inference_steps: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(num_inference_steps, 1, folder, num_subsets=32)
        with held_for_backward() as held:
            trainer.train()
    return held.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/step_overhead.json"))
    args = parser.parse_args()
    seconds = measure_overhead(args.updates)
    overhead = 1 - seconds["network and features"] / seconds["step"]
    memory = {steps: measure_memory(steps) for steps in (10, 50)}
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "overhead": overhead,
        "bytes_held_for_backward": memory,
    }
    print(f"step {seconds['step']:.3f} s, network and features {seconds['network and features']:.3f} s")
    print(f"overhead {overhead:.1%}")
    for steps, size in memory.items():
        print(f"T = {steps}: {size / 2**20:.1f} MiB held for the backward pass")
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
