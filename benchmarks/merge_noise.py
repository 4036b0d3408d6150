# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
How well a step ranks candidate merges: rewards of the same candidates from other noise, on the digits example.

    OMP_NUM_THREADS=1 python benchmarks/merge_noise.py

For each size of a candidate's set, with and without replaced subsets (Eq. 10 of arXiv 2607.02291), the correlation of
two steps' rewards over candidates: where all candidates of a step see the same noise, and where each has its own.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import prepare, prepare_pool  # noqa: E402
from digits_merge import build_trainer  # noqa: E402

from trl_distreward.merging.coefficients import gaussian_samples  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "100 images": {"reference_set_size": 100},
    "250 images": {"reference_set_size": 250},
    "500 images": {"reference_set_size": 500},
    "250 images, 5 subsets of 50 replaced once": {
        "reference_set_size": 250,
        "num_subsets": 5,
        "num_replacements": 1,
        "replace_size": 50,
    },
    "400 images, 1 subset of 50 replaced twice": {
        "reference_set_size": 400,
        "num_subsets": 1,
        "num_replacements": 2,
        "replace_size": 50,
    },
}


def correlations(rewards: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Of rewards `(steps, candidates)`: between two steps, and between draws of a step for each candidate."""
    steps, count = rewards.shape
    shared = [np.corrcoef(rewards[a], rewards[b])[0, 1] for a, b in itertools.combinations(range(steps), 2)]
    own = []
    for _ in range(200):
        drawn = np.argsort(generator.random((steps, count)), axis=0)[:2]  # two different steps for each candidate
        first, second = (rewards[row, np.arange(count)] for row in drawn)
        own.append(np.corrcoef(first, second)[0, 1])
    return float(np.mean(shared)), float(np.mean(own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("outputs/digits/cache"), help="where pretraining is kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    pool, times = prepare_pool(args.cache, args.seed, 600)
    digits = prepare(args.cache, args.seed, 600)
    results = {}
    print("| a candidate's images | in all | shared noise | own noise |\n|---|---|---|---|")
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(digits, pool, times, Path(folder), seed=args.seed, **settings)
        trainer._judge_start()
        generator = torch.Generator().manual_seed(args.seed)
        candidates = gaussian_samples(trainer.initial_coefficients, 0.1, args.candidates, generator)
        candidates -= (candidates.sum(dim=-1, keepdim=True) - 1) / candidates.shape[-1]
        rewards = np.array([trainer.judge.judge(candidates, step)[:, 0].tolist() for step in range(args.steps)])
        shared, own = correlations(rewards, np.random.default_rng(args.seed))
        images = trainer.args.images_per_candidate
        results[name] = {"images": images, "shared": shared, "own": own, "rewards": rewards.tolist()}
        print(f"| {name} | {images} | {shared:.2f} | {own:.2f} |", flush=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
