# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
How often to generate the reference set anew, on digits, at equal images generated (reference sets counted).

    OMP_NUM_THREADS=1 python benchmarks/refresh.py

Fixed intervals of 5, 10 and 20 updates (the paper's Fig. 5), "auto", and the rolling set, with everything else equal.
"""

import argparse

from runs import parse_args, run, table, write

SETTINGS: dict[str, dict] = {
    "refresh 5": {"reference_refresh_steps": 5},
    "refresh 10": {"reference_refresh_steps": 10},
    "refresh 20": {"reference_refresh_steps": 20},
    "auto, drift 0.5": {"reference_refresh_steps": "auto", "refresh_drift": 0.5},
    "auto, drift 1": {"reference_refresh_steps": "auto", "refresh_drift": 1.0},
    "auto, drift 2": {"reference_refresh_steps": "auto", "refresh_drift": 2.0},
    "rolling": {"reference_update": "rolling"},
}
COLUMNS = ["updates", "refreshes", "images", "fd_heldout ode", "fd_heldout sde", "fd_reward ode", "fd_pixel ode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace-size", type=int, default=8, help="images of a subset; 256 are generated per update")
    parser.add_argument("--arms", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parse_args(parser, __file__, seeds=[0, 10, 20], budget=16_300)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.arms}
    for seed in args.seeds:
        for name in args.arms:
            settings = SETTINGS[name]
            runs[name].append(run(args.prepare(seed), seed, args.budget, replace_size=args.replace_size, **settings))
            print(seed, name, {key: round(value, 3) for key, value in runs[name][-1].items()}, flush=True)
    print(table(runs, COLUMNS))
    write(args.output, args, runs=runs)


if __name__ == "__main__":
    main()
