# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Many steps or one: digits' generator trained on the distance as it is sampled, or as a generator of one step.

    OMP_NUM_THREADS=1 python benchmarks/one_step.py

The one-step generator is the same network, trained by back-propagation through a single Euler step from noise to
data. It is given as many images as the others, and once as many network evaluations, which is ten times the images.
All others sample with 10 steps. Every network is judged by 2,000 images of the ODE with 20 steps and with 1, in the
features of a classifier that the reward does not see. All rates fall to 0 from 1e-4.
"""

import argparse
import json
import tempfile
import time

from runs import METRICS, Digits, StopAtBudget, build_trainer, parse_args, table, write

ROLLING = {
    "reference_update": "rolling",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "num_inference_steps_eval": [20, 1],
    "eval_samplers": ["ode"],
}
BACKPROP = {**ROLLING, "loss_type": "backprop", "sampler": "ode"}
ONE_STEP = {**BACKPROP, "num_inference_steps": 1, "backprop_steps": 1}
ARMS: dict[str, tuple[int, dict]] = {  # updates of 256 images, and settings
    "base": (0, ROLLING),
    "policy gradient, 10 steps": (23, ROLLING),
    "backprop, last 3 of 10 steps": (23, {**BACKPROP, "backprop_steps": 3}),
    "backprop, 1 step, as many images": (23, ONE_STEP),
    "backprop, 1 step, ten times the images": (230, ONE_STEP),
}
COLUMNS = ["images", "evaluations", "seconds"]
COLUMNS += [f"{name} {steps}" for steps in (20, 1) for name in ("fd_heldout", "fd_pixel", "accuracy")]


def run(prepared: Digits, seed: int, updates: int, settings: dict) -> dict[str, float]:
    images, evaluations = StopAtBudget(10**9), [0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(prepared, folder, **settings, max_steps=max(updates, 1), seed=seed)
        images.trainer = trainer
        started = time.process_time()
        hook = trainer.network.register_forward_hook(lambda _, inputs, output: evaluations.append(len(output[0])))
        if updates:
            trainer.train()
        hook.remove()
        seconds = time.process_time() - started
        metrics = trainer.evaluate()
    found = {
        f"{name} {steps}": metrics[f"eval_ode_{steps}_{key}"] for steps in (20, 1) for name, key in METRICS.items()
    }
    return {"images": images.images if updates else 0, "evaluations": sum(evaluations), "seconds": seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parse_args(parser, __file__, seeds=[0, 10, 20, 30, 40], budget=0, data=("digits",))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.arms}
    for seed in args.seeds:
        for name in args.arms:
            runs[name].append(run(args.prepare(seed), seed, *ARMS[name]))
            print(seed, name, json.dumps({key: round(value, 3) for key, value in runs[name][-1].items()}), flush=True)
        write(args.output, args, runs=runs)
    print(table(runs, COLUMNS))


if __name__ == "__main__":
    main()
