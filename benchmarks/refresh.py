# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
How often to generate the reference set anew, on digits, at equal images generated (reference sets counted).

    OMP_NUM_THREADS=1 python benchmarks/refresh.py

Fixed intervals of 5, 10 and 20 updates (the paper's Fig. 5), "auto", and the rolling set, with everything else equal.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from trl_distreward import DiffusionDistributionConfig, DistributionRewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import METRICS, prepare  # noqa: E402

SETTINGS: dict[str, dict] = {
    "refresh 5": {"reference_refresh_steps": 5},
    "refresh 10": {"reference_refresh_steps": 10},
    "refresh 20": {"reference_refresh_steps": 20},
    "auto": {"reference_refresh_steps": "auto"},
    "rolling": {"reference_update": "rolling"},
}


class StopAtBudget(TrainerCallback):
    """Ends training once so many images have been generated for rollouts and reference sets."""

    def __init__(self, budget: int):
        self.budget = budget
        self.trainer: DistributionRewardTrainer | None = None

    def images(self) -> int:
        args = self.trainer.args
        refreshes = len([e for e in self.trainer.state.log_history if "seconds/refresh" in e])
        return (
            args.num_subsets * args.replace_size * self.trainer.state.global_step + refreshes * args.reference_set_size
        )

    def on_log(self, args, state, control, **kwargs):
        if self.images() >= self.budget:
            control.should_training_stop = True


def run(settings: dict, seed: int, args: argparse.Namespace) -> dict[str, float]:
    digits = prepare(args.cache, seed, 600)
    stop = StopAtBudget(args.budget)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistributionRewardTrainer(
            model=str(digits.base_path),
            reward_funcs=digits.reward(label_weight=1.5),
            args=DiffusionDistributionConfig(
                output_dir=folder,
                seed=seed,
                max_steps=10_000,
                learning_rate=args.learning_rate,
                reference_set_size=1000,
                num_subsets=256 // args.replace_size,
                replace_size=args.replace_size,
                top_advantage_quantile=1.0,
                ema_decay=0.9,
                num_inference_steps=10,
                noise_level=0.7,
                last_step_size=None,
                num_inference_steps_eval=20,
                num_eval_images=2000,
                per_device_train_batch_size=256,
                per_device_eval_batch_size=500,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **settings,
            ),
            eval_metrics=digits.eval_metrics(),
            callbacks=[stop],
        )
        stop.trainer = trainer
        trainer.train()
        history = trainer.state.log_history
        result = {"updates": trainer.state.global_step, "images": stop.images()}
        result["refreshes"] = len([e for e in history if "seconds/refresh" in e])
        metrics = trainer.evaluate()
    for sampler in ("sde", "ode"):
        result |= {f"{name} {sampler}": metrics[f"eval_{sampler}_{key}"] for name, key in METRICS.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 20], help="training seeds")
    parser.add_argument("--budget", type=int, default=16_000, help="images of a run")
    parser.add_argument("--replace-size", type=int, default=8, help="images of a subset; 256 are generated per update")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="constant")
    parser.add_argument("--cache", type=Path, default=Path("outputs/digits/cache"), help="where pretraining is kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for seed in args.seeds:
        for name, settings in SETTINGS.items():
            runs[name].append(run(settings, seed, args))
            print(seed, name, {key: round(value, 3) for key, value in runs[name][-1].items()}, flush=True)
    columns = ["updates", "refreshes", "images", "fd_heldout ode", "fd_heldout sde", "fd_reward ode", "fd_pixel ode"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, results in runs.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            whole = column in columns[:3]
            cells.append(f"{np.mean(values):.0f}" if whole else f"{np.mean(values):.2f} ± {spread:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    args.output.write_text(json.dumps({"settings": settings, "versions": versions, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
