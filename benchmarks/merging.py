# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
How to find merging coefficients: eight checkpoints of the digits example's pretraining, all methods at equal images.

    OMP_NUM_THREADS=1 python benchmarks/merging.py

Each judges as many candidates by as many images. Nothing is chosen by what the reward does not see, and what is found
is judged by 2,000 images from noise that no method has seen.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from runs import parse_args, table, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import prepare, prepare_pool  # noqa: E402
from digits_merge import COLUMNS, run_methods  # noqa: E402

PAPER = {"antithetic_sampling": False, "sampling_std_decay": 1.0, "coefficient_map": "softmax", "sampling_std": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "best power profile": {"method": "grid"},
    "CMA-ES": {"method": "cma"},
    "EMANet": {"method": "emanet"},
    "EMANet, softmax, standard deviation 1": {"method": "emanet", **PAPER},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    # twelve steps of ten candidates of 100 images, and 1,000 images of the start
    args = parse_args(parser, __file__, seeds=[0, 10, 20, 30, 40], budget=13_000, data=["digits"])
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        pool, times = prepare_pool(args.cache, seed, 600)
        digits = prepare(args.cache, seed, 600)
        methods = {name: METHODS[name] for name in args.methods}
        steps = args.budget // 1000 - 1
        with tempfile.TemporaryDirectory() as folder:
            rows = run_methods(digits, pool, times, Path(folder), methods, seed=seed, max_steps=steps)
        for name, row in rows.items():
            runs.setdefault(name, []).append(row)
        print(json.dumps({"seed": seed, **{name: round(row["reward"], 3) for name, row in rows.items()}}), flush=True)
        write(args.output, args, runs=runs)
    means = {name: [{c: row[c] for c in COLUMNS} for row in rows] for name, rows in runs.items()}
    print(table(means, COLUMNS))
    for other in ("best power profile", "CMA-ES"):
        if {other, "EMANet"} <= set(runs):
            for column in ("reward", "fd_heldout"):
                pairs = zip(runs["EMANet"], runs[other], strict=True)
                gains = [(mine[column] - its[column]) * (1 if column == "reward" else -1) for mine, its in pairs]
                print(
                    f"EMANet against {other}, {column}: better on {sum(g > 0 for g in gains)} of {len(gains)} seeds,"
                    f" by {np.mean(gains):.3f} on average"
                )


if __name__ == "__main__":
    main()
