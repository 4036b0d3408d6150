# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Ways to find merging coefficients, compared at equal images: eight checkpoints of the digits example's pretraining.

    OMP_NUM_THREADS=1 python benchmarks/merging.py
    OMP_NUM_THREADS=1 python benchmarks/merging.py --noise

Each method judges twelve steps of ten candidates by 100 images each, after 1,000 images of the start. No method sees
the held-out metrics. Results are judged by 2,000 images from new noise.

--noise measures how well one step ranks its candidates: for several sizes of a candidate's set, with and without
replaced subsets (Eq. 10 of arXiv 2607.02291), the correlation over candidates of two steps' rewards, if all candidates
of a step share the noise, and if each has its own.
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
from results import Row, Runs, markdown, rounded, summarize, write_table
from runs import parse_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import prepare, prepare_pool  # noqa: E402
from digits_merge import COLUMNS, build_trainer, run_methods  # noqa: E402

from trl_distreward.merging.coefficients import gaussian_samples  # noqa: E402

# The closest to the paper, which draws with a standard deviation of 1 and names no map
SOFTMAX = {"antithetic_sampling": False, "sampling_std_decay": 1.0, "coefficient_map": "softmax", "sampling_std": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "best power profile": {"method": "grid"},
    "CMA-ES": {"method": "cma"},
    "EMANet": {"method": "emanet"},
    "EMANet, softmax, standard deviation 1": {"method": "emanet", **SOFTMAX},
}
REPLACED = ("reference_set_size", "num_subsets", "num_replacements")
CANDIDATES: dict[str, dict[str, int]] = {
    **{f"{size} images": {"reference_set_size": size} for size in (100, 250, 500)},
    "250 images, 5 × 50 replaced 1 ×": dict(zip(REPLACED, (250, 5, 1), strict=True)),
    "400 images, 1 × 50 replaced 2 ×": dict(zip(REPLACED, (400, 1, 2), strict=True)),
}


def compare_methods(args: argparse.Namespace) -> None:
    methods, runs = {name: METHODS[name] for name in args.methods}, Runs()
    for seed in args.seeds:
        pool, times = prepare_pool(args.cache, seed, 600)
        digits = prepare(args.cache, seed, 600)
        with tempfile.TemporaryDirectory() as folder:
            rows = run_methods(digits, pool, times, Path(folder), methods, seed=seed, max_steps=args.steps)
        for name, row in rows.items():
            runs.setdefault(name, []).append(row)
        print(json.dumps({"seed": seed, **{name: round(row["reward"], 3) for name, row in rows.items()}}), flush=True)
        write_table(Path(__file__).with_suffix(".json"), summarize(runs), seeds=args.seeds)
    means = {(row["arm"], row["metric"]): f"{row['mean']:.3f}" for row in summarize(runs)}
    print(markdown(["", *COLUMNS], [[arm, *(means[arm, column] for column in COLUMNS)] for arm in runs]))


def measure_noise(args: argparse.Namespace, candidates: int = 12, steps: int = 4) -> None:
    seed = args.seeds[0]
    pool, times = prepare_pool(args.cache, seed, 600)
    digits, rows = prepare(args.cache, seed, 600), list[Row]()
    for name, settings in CANDIDATES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(digits, pool, times, Path(folder), seed=seed, **settings)
        trainer._judge_start()
        generator = torch.Generator().manual_seed(seed)
        drawn = gaussian_samples(trainer.initial_coefficients, 0.1, candidates, generator)
        drawn -= (drawn.sum(dim=-1, keepdim=True) - 1) / drawn.shape[-1]
        rewards = np.array([trainer.judge.judge(drawn, step)[:, 0].tolist() for step in range(steps)])
        shared, own = correlations(rewards, np.random.default_rng(seed))
        images = trainer.args.images_per_candidate
        rows.append(rounded({"candidate": name, "images": images, "shared_noise": shared, "own_noise": own}, 4))
        print(rows[-1], flush=True)
    write_table(Path(__file__).with_name("merge_noise.json"), rows, seeds=[seed])


def correlations(rewards: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Mean correlations of rewards `(steps, candidates)` between two steps, with shared noise and with own noise."""
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=12, help="steps of each method")
    parser.add_argument("--noise", action="store_true", help="measure how well a step ranks candidates")
    args = parse_args(parser, data=["digits"])
    (measure_noise if args.noise else compare_methods)(args)


if __name__ == "__main__":
    main()
