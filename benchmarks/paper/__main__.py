# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The paper's tables and figures in miniature, and comparisons of this library's estimators, on small images.

    OMP_NUM_THREADS=1 python benchmarks/paper training
    OMP_NUM_THREADS=1 python benchmarks/paper training --data mnist --folder FOLDER
    python benchmarks/paper page

An experiment keeps its runs in a log in `outputs/paper`, continues where the log ends, and writes a table of means and
intervals next to this file. `page` draws the plots and fills the tables of the documentation.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import EXPERIMENTS, PAPER, RATES, Arm, Experiment, affordable_updates  # noqa: E402
from judges import LogOdds, heldout_metrics  # noqa: E402
from page import write_page  # noqa: E402
from results import append_run, complete, read_runs, write_table  # noqa: E402
from runs import IMAGES_PER_UPDATE, Digits, FallingNoise, build_trainer, held_for_backward, parse_args, run  # noqa: E402
from summary import rows_of  # noqa: E402

from trl_distreward.evaluation.image_metrics import MeanScore  # noqa: E402

HERE = Path(__file__).resolve().parent
LOGS = Path("outputs/paper")


def train_arm(
    prepared: Digits, arm: Arm, experiment: Experiment, seed: int, rates: dict[str, float], kept: Path | None = None
) -> dict[str, Any]:
    """Trains and evaluates one arm; the images of an arm that trains first count."""
    budget, spent, start = arm.budget or experiment.budget, 0, prepared
    with tempfile.TemporaryDirectory() as folder:
        if arm.after is not None:
            budget //= 2
            first = {**arm.after.settings, "learning_rate": rates[arm.after.kind], "num_eval_images": 100}
            spent = run(prepared, seed, budget, reward=arm.after.reward, save_to=Path(folder), **first)["images"]
            start = replace(prepared, base_path=Path(folder))
        settings = {
            "num_inference_steps_eval": list(experiment.eval_steps),
            "eval_samplers": list(experiment.eval_samplers),
            "num_eval_images": experiment.eval_images,
            **arm.settings,
            "learning_rate": arm.rate or rates[arm.kind] * arm.rate_factor,
        }
        if settings["lr_scheduler_type"] == "linear":  # falls to 0 when the images are spent
            settings["max_steps"] = affordable_updates(settings, budget, IMAGES_PER_UPDATE)
        score = LogOdds(prepared.spaces["last"].__self__)
        metrics: dict[str, Any] = heldout_metrics(prepared) if experiment.heldout else {}
        if any(other.sample_wise for other in experiment.arms.values()):
            metrics["log_odds"] = MeanScore(score)
        result = run(
            start,
            seed,
            budget,
            reward=arm.reward,
            others=[score] if arm.sample_wise else [],
            eval_metrics=metrics,
            evaluations=experiment.evaluations,
            callbacks=[FallingNoise(*arm.noise_levels)] if arm.noise_levels else [],
            save_to=kept and kept / f"{seed}",
            **settings,
        )
        if experiment.memory:
            result["held_mib"] = held_mib(prepared, settings) if budget else 0.0
    return result | {"images": spent + result["images"], "learning_rate": settings["learning_rate"]}


def held_mib(prepared: Digits, settings: dict[str, Any]) -> float:
    """Measures the most that autograd holds in one update, in micro-batches of 64."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(prepared, folder, **{**settings, "max_steps": 1, "per_device_train_batch_size": 64})
        with held_for_backward(weights=False) as held:
            trainer.train()
    return held.most / 2**20


def spread_of_rewards(prepared: Digits, seed: int) -> dict[str, float]:
    """Measures coefficients of variation of one update's rewards by the number of replaced images."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**PAPER, "replace_size": 64, "num_subsets": 32, "learning_rate": 0.0}
        trainer = build_trainer(prepared, folder, max_steps=1, seed=seed, **settings)
        (reward,) = trainer.rewards.of_sets
        judge, found = reward.subset_rewards, {}

        def watched(slots: Tensor, features: dict[str, Tensor]) -> Tensor:
            for k in (1, 2, 4, 8, 16, 32, 64):  # the first k images of each subset
                parts = {name: v.view(*slots.shape, -1)[:, :k].flatten(0, 1) for name, v in features.items()}
                rewards = judge(slots[:, :k], parts)
                found[f"{k}"] = 100 * (rewards.std() / rewards.mean().abs()).item()
            return judge(slots, features)

        reward.subset_rewards = watched
        trainer.train()
    return found


def runs_of(name: str, rates: dict[str, float], wanted: list[str] | None) -> dict[str, Callable[..., dict[str, Any]]]:
    """Returns functions of a prepared generator and a seed, by arm."""
    if name == "reward_spread":
        return {"spread": spread_of_rewards}
    experiment = EXPERIMENTS[name]
    base = partial(
        train_arm, arm=Arm("paper", PAPER, rate=1e-5), experiment=replace(experiment, budget=0), rates=rates
    )
    arms = {
        arm: partial(
            train_arm,
            arm=experiment.arms[arm],
            experiment=experiment,
            rates=rates,
            kept=LOGS / name / arm if experiment.keep else None,
        )
        for arm in wanted or experiment.arms
    }
    return {"base": base, **arms}


def main() -> None:
    names = "\n".join(f"  {name:18} {experiment.about}" for name, experiment in EXPERIMENTS.items())
    names += "\n  reward_spread      Table 5: coefficients of variation of rewards by the size of subsets"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"experiments:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*EXPERIMENTS, "reward_spread", "page"]
    parser.add_argument("name", choices=choices, metavar="NAME", help="an experiment, see below, or page")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    args = parse_args(parser)
    if args.name == "page":
        write_page(HERE)
        return
    log = LOGS / f"{args.name}_{args.data}.jsonl"
    for seed in args.seeds:
        for arm, make in runs_of(args.name, RATES.get(args.data, {}), args.arms).items():
            if any(done["seed"] == seed for done in read_runs(log).get(arm, [])):
                continue
            result = make(args.prepare(seed), seed=seed)
            append_run(log, arm, seed, result)
            shown = {key: round(value, 3) for key, value in result.items() if isinstance(value, float | int)}
            print("RESULT", seed, arm, json.dumps(shown), flush=True)
    runs = complete(read_runs(log))
    seeds = [run["seed"] for run in next(iter(runs.values()))]
    write_table(HERE / f"{args.name}_{args.data}.json", rows_of(runs), seeds=seeds)


if __name__ == "__main__":
    main()
