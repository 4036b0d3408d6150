# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Which estimator: policy gradients, rejection sampling and back-propagation, on digits or MNIST at equal images
generated.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py
    OMP_NUM_THREADS=1 python benchmarks/estimators.py --data mnist

Each arm generates as many images, reference sets counted; the paper's recipe at a constant rate of 5e-5, the others at
1e-4 falling to 0. Evaluations are the network's, one image each, forward;
memory is what autograd holds for the backward pass at its peak, of one update in micro-batches of 64.
"""

import argparse
import json
import tempfile

from held import held_for_backward
from runs import IMAGES_PER_UPDATE, Digits, build_trainer, parse_args, run, table, write

PAPER = {
    "learning_rate": 5e-5,
    "replace_size": 8,
    "reference_refresh_steps": 10,
    "top_advantage_quantile": 0.25,
    "ema_decay": 0.0,
}
ROLLING = {"reference_update": "rolling", "learning_rate": 1e-4, "lr_scheduler_type": "linear"}
ARMS: dict[str, dict] = {
    "GRPO, paper's recipe": PAPER,
    "GRPO, one image a subset": ROLLING,
    "rejection sampling": {**ROLLING, "loss_type": "rft", "top_advantage_quantile": 0.25},
} | {
    f"backprop, {'all' if steps == 10 else f'last {steps}'}, {sampler.upper()}": {
        **ROLLING,
        "loss_type": "backprop",
        "backprop_steps": steps,
        "sampler": sampler,
    }
    for sampler in ("sde", "ode")
    for steps in (1, 3, 10)
}
COLUMNS = ["images", "evaluations", "seconds", "held MiB"]
COLUMNS += ["fd_heldout ode", "fd_heldout sde", "fd_reward ode", "fd_pixel ode", "accuracy ode"]


def held_mib(prepared: Digits, settings: dict) -> float:
    with tempfile.TemporaryDirectory() as folder:
        one_update = {**settings, "max_steps": 1, "per_device_train_batch_size": 64}
        trainer = build_trainer(prepared, folder, **one_update)
        with held_for_backward(weights=False) as held:
            trainer.train()
    return held.most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parse_args(parser, __file__, seeds=[0, 10, 20, 30, 40], budget=7_140)
    arms = {name: ARMS[name] for name in args.arms}
    updates = (args.budget - 1000) // IMAGES_PER_UPDATE
    memory = {name: held_mib(args.prepare(args.seeds[0]), settings) for name, settings in arms.items()}
    runs: dict[str, list[dict[str, float]]] = {"base": [], **{name: [] for name in arms}}
    for seed in args.seeds:
        runs["base"].append(run(args.prepare(seed), seed, 0) | {"held MiB": 0.0})
        for name, settings in arms.items():
            steps = {} if settings is PAPER else {"max_steps": updates}
            result = run(args.prepare(seed), seed, args.budget, **{**steps, **settings})
            runs[name].append(result | {"held MiB": memory[name]})
            shown = {key: round(value, 3) for key, value in runs[name][-1].items() if key in COLUMNS}
            print(seed, name, json.dumps(shown), flush=True)
        write(args.output, args, runs=runs)
    print(table(runs, COLUMNS))


if __name__ == "__main__":
    main()
