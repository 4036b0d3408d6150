# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The paper's tables and figures in miniature, on digits or MNIST.

    OMP_NUM_THREADS=1 python benchmarks/paper training
    OMP_NUM_THREADS=1 python benchmarks/paper training --data mnist --mnist FOLDER
    OMP_NUM_THREADS=1 python benchmarks/paper selection --seeds 0 10 20 30 40
    python benchmarks/paper page

An experiment writes its results beside this file, after every run, and goes on where it was stopped. `rates` tries
learning rates on a seed that no experiment uses; `page` draws the plots and fills the tables of
docs/source/paper_in_miniature.md from what is written.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import (  # noqa: E402
    BACKPROP,
    EXPERIMENTS,
    PAPER,
    RATES,
    ROLLING,
    Arm,
    Experiment,
    affordable_updates,
)
from judges import LogOdds, MeanOf, heldout_metrics  # noqa: E402
from page import write_page  # noqa: E402
from runs import IMAGES_PER_UPDATE, Digits, FallingNoise, build_trainer, parse_args, run, write  # noqa: E402

TUNING_SEED = 100
TUNED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "RL": (PAPER, [2e-5, 5e-5, 1e-4]),
    "RS": ({**PAPER, "loss_type": "rft"}, [1e-6, 3e-6, 1e-5]),
    "GRPO": (ROLLING, [5e-5, 1e-4, 2e-4]),
    "backprop": (BACKPROP, [1e-4, 2e-4, 4e-4]),
}
RATE_EXPERIMENT = Experiment(
    "learning rates, on a seed of their own",
    {
        f"{name}, {rate:g}": Arm(name, settings, rate=rate)
        for name, (settings, rates) in TUNED.items()
        for rate in rates
    },
    budget=8_000,
)


def sized(settings: dict[str, Any]) -> dict[str, Any]:
    """As many subsets as make the images of an update."""
    return {**settings, "num_subsets": IMAGES_PER_UPDATE // settings["replace_size"]}


def train_arm(
    prepared: Digits, arm: Arm, experiment: Experiment, seed: int, rates: dict[str, float], metrics: dict[str, Any]
) -> dict[str, Any]:
    """One arm of an experiment; the images of an arm that trains first count."""
    budget, spent, start = experiment.budget, 0, prepared
    with tempfile.TemporaryDirectory() as folder:
        if arm.after is not None:
            budget //= 2
            first = {**sized(arm.after.settings), "learning_rate": rates[arm.after.kind], "num_eval_images": 100}
            spent = run(prepared, seed, budget, arm.after.reward, save_to=Path(folder), **first)["images"]
            start = replace(prepared, base_path=Path(folder))
        rate = arm.rate or rates[arm.kind] * arm.rate_factor
        settings = {
            "num_inference_steps_eval": list(experiment.eval_steps),
            "num_eval_images": experiment.eval_images,
            **sized(arm.settings),
            "learning_rate": rate,
        }
        if settings["lr_scheduler_type"] == "linear":  # falls to 0 when the images are spent
            settings["max_steps"] = affordable_updates(settings, budget, IMAGES_PER_UPDATE)
        score = LogOdds(prepared.spaces["last"].__self__)
        result = run(
            start,
            seed,
            budget,
            arm.reward,
            [score] if arm.sample_wise else [],
            metrics | ({"log_odds": MeanOf(score)} if any(a.sample_wise for a in experiment.arms.values()) else {}),
            experiment.evaluations,
            [FallingNoise(*arm.noise_levels)] if arm.noise_levels else [],
            **settings,
        )
    return result | {"images": spent + result["images"], "learning_rate": rate}


def spread_of_rewards(prepared: Digits, seed: int) -> dict[str, float]:
    """Table 5: coefficients of variation of one update's rewards by the number of images replaced."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**PAPER, "replace_size": 64, "num_subsets": 32, "learning_rate": 0.0}
        trainer = build_trainer(prepared, folder, max_steps=1, seed=seed, **settings)
        (reward,) = trainer.rewards.of_sets
        judge, found = reward.subset_rewards, {}

        def watched(slots: Tensor, features: dict[str, Tensor]) -> Tensor:
            for k in (1, 2, 4, 8, 16, 32, 64):  # the first k images of each subset
                parts = {name: v.view(*slots.shape, -1)[:, :k].flatten(0, 1) for name, v in features.items()}
                rewards = judge(slots[:, :k], parts)
                found[f"cv_percent/n_{k}"] = 100 * (rewards.std() / rewards.mean().abs()).item()
            return judge(slots, features)

        reward.subset_rewards = watched
        trainer.train()
    return found


def main() -> None:
    names = "\n".join(f"  {name:16} {experiment.about}" for name, experiment in EXPERIMENTS.items())
    names += "\n  reward_spread    Table 5: coefficients of variation of rewards by the size of subsets"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"experiments:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*EXPERIMENTS, "reward_spread", "rates", "page"]
    parser.add_argument("name", choices=choices, metavar="NAME", help="an experiment, see below; or rates, or page")
    parser.add_argument("--arms", nargs="+", help="these arms only")
    args = parse_args(parser, __file__, seeds=[0, 10, 20, 30, 40], budget=0)
    folder = Path(__file__).resolve().parent
    if args.name == "page":
        write_page(folder)
        return
    args.output = folder / f"{args.name}_{args.data}.json"
    if args.name == "rates":
        args.seeds, experiment = [TUNING_SEED], RATE_EXPERIMENT
    else:
        experiment = EXPERIMENTS.get(args.name, Experiment("", {}, 0))
    args.budget = experiment.budget
    unknown = set(args.arms or ()) - set(experiment.arms)
    if unknown:
        parser.error(f"--arms {', '.join(sorted(unknown))}: {args.name} has {', '.join(experiment.arms)}")
    runs = json.loads(args.output.read_text())["runs"] if args.output.is_file() else {}

    def keep(name: str, seed: int, result: dict[str, Any]) -> None:
        runs.setdefault(name, []).append({"seed": seed, **result})
        write(args.output, args, about=experiment.about, runs=runs)
        shown = {key: round(value, 3) for key, value in result.items() if isinstance(value, float | int)}
        print("RESULT", seed, name, json.dumps(shown), flush=True)

    for seed in args.seeds:
        done = [name for name, results in runs.items() if any(result["seed"] == seed for result in results)]
        prepared = args.prepare(seed)
        if args.name == "reward_spread":
            if "spread" not in done:
                keep("spread", seed, spread_of_rewards(prepared, seed))
            continue
        missing = [name for name in args.arms or experiment.arms if name not in done]
        metrics = heldout_metrics(prepared) if experiment.heldout and (missing or "base" not in done) else {}
        if "base" not in done:
            base = Arm("RL", PAPER)
            keep(
                "base", seed, train_arm(prepared, base, replace(experiment, budget=0), seed, RATES[args.data], metrics)
            )
        for name in missing:
            arm = experiment.arms[name]
            keep(name, seed, train_arm(prepared, arm, experiment, seed, RATES[args.data], metrics))


if __name__ == "__main__":
    main()
