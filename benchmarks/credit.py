# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Whom to credit: subsets of 1, 2, 8 and 32 images with a shared reward, leave-one-in credit, the control variate and the
debiased target, on digits with the rolling reference set, at equal images generated.

    OMP_NUM_THREADS=1 python benchmarks/credit.py

Each arm's learning rate is chosen on the first seed, by the held-out distance under ODE; that seed's run at the chosen
rate is kept, and the other seeds follow at that rate.
"""

import argparse

from runs import parse_args, run, table, write

ARMS: dict[str, tuple[int, dict]] = {
    "shared, n = 1": (1, {}),
    "shared, n = 2": (2, {}),
    "shared, n = 8": (8, {}),
    "shared, n = 32": (32, {}),
    "control variate, n = 1": (1, {"control_variate": True}),
    "control variate, n = 8": (8, {"control_variate": True}),
    "leave one in, n = 8": (8, {"credit": "leave_one_in"}),
    "debiased, n = 1": (1, {"debias": True}),
}
COLUMNS = ["learning_rate", "images", "fd_heldout ode", "fd_heldout sde", "fd_reward ode", "fd_pixel ode"]
TUNED_BY = "fd_heldout ode"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-5, 1e-4], help="to choose from")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parse_args(parser, __file__, seeds=[0, 10, 20, 30, 40], budget=5_100)
    base = [run(args.prepare(seed), seed, 0) | {"learning_rate": 0.0} for seed in args.seeds]
    runs: dict[str, list[dict[str, float]]] = {"base": base}
    tuning: dict[str, list[dict[str, float]]] = {}
    for name in args.arms:
        size, reward = ARMS[name]

        def train(seed: int, rate: float, size: int = size, reward: dict = reward) -> dict[str, float]:
            settings = {"replace_size": size, "learning_rate": rate, "reference_update": "rolling"}
            return run(args.prepare(seed), seed, args.budget, reward, **settings) | {"learning_rate": rate}

        tuning[name] = [train(args.seeds[0], rate) for rate in args.learning_rates]
        best = min(tuning[name], key=lambda result: result[TUNED_BY])
        runs[name] = [best, *(train(seed, best["learning_rate"]) for seed in args.seeds[1:])]
        print(name, [round(result[TUNED_BY], 3) for result in tuning[name] + runs[name][1:]], flush=True)
        write(args.output, args, runs=runs, tuning=tuning)
    print(table(runs, COLUMNS))


if __name__ == "__main__":
    main()
