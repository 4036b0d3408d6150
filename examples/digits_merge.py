# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Merging in minutes on a CPU: eight checkpoints of the digits example's pretraining become one better model.

    python examples/digits_merge.py
    python examples/digits_merge.py --methods emanet cma --seed 10

All methods judge equally many candidates by equally many images, with the reward of examples/digits.py. Their results
are judged by 2,000 images from new noise and by a classifier that the reward does not use.

Output folder: merge.json and merge.md, and the pipeline of each method.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from digits import METRICS, Digits, prepare, prepare_pool  # noqa: E402

from trl_distreward import MergeCoefficientConfig, MergeCoefficientTrainer  # noqa: E402

COLUMNS = ["reward", *METRICS]
METHODS: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("grid", "cma", "emanet")}


def build_trainer(
    digits: Digits, pool: list[Path], times: list[float], folder: Path, **settings: Any
) -> MergeCoefficientTrainer:
    """Builds a trainer of the pool's coefficients; `settings` override the configuration."""
    defaults = {
        "output_dir": str(folder),
        "num_generations": 10,
        "max_steps": 12,
        "checkpoint_times": times,
        "reference_set_size": 100,
        "scale_set_size": 1000,
        "num_inference_steps": 10,
        "num_eval_images": 2000,
        "per_device_eval_batch_size": 500,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MergeCoefficientTrainer(
        model=str(digits.base_path),
        checkpoints=[str(path) for path in pool],
        reward_funcs=digits.reward(),
        args=MergeCoefficientConfig(**{**defaults, **settings}),
        eval_metrics=digits.eval_metrics(),
    )


def row_of(trainer: MergeCoefficientTrainer, values: dict[str, float]) -> dict[str, float]:
    """Computes the reward of an evaluation, with distances divided by those of the first set, and the metrics."""
    (reward,) = trainer.rewards.of_sets
    parts = [
        reward.space_weights[space] * values[f"ode_distance_{space}"] / first
        for space, first in reward.first_distances.items()
    ]
    return {"reward": -sum(parts), **{name: values[f"ode_{key}"] for name, key in METRICS.items()}}


def run_methods(
    digits: Digits, pool: list[Path], times: list[float], folder: Path, methods: dict[str, dict], **settings: Any
) -> dict[str, dict[str, Any]]:
    """Computes metrics, coefficients and seconds of simple merges and of the merge that each method finds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        trainer = build_trainer(digits, pool, times, folder / name, **{**settings, **method})
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        found = {name: trainer.coefficients}
        if not rows:  # simple merges do not depend on the method
            size = len(pool)
            found = {
                "last": [0.0] * (size - 1) + [1.0],
                "uniform": [1 / size] * size,
                "start": trainer.initial_coefficients,
                **found,
            }
        for merge, coefficients in found.items():
            # evaluation noise differs from training noise
            values = {k.removeprefix("eval_"): v for k, v in trainer.evaluate(coefficients=coefficients).items()}
            weights = trainer._expanded(coefficients)[0].tolist()
            rows[merge] = row_of(trainer, values) | {"coefficients": weights}
        rows[name] |= {"images": trainer.num_images, "seconds": seconds}
        trainer.save_model(str(folder / name / "pipeline"))
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.3f}' for c in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/digits-merge"), help="folder for all output")
    parser.add_argument("--cache", type=Path, default=Path("outputs/digits/cache"), help="pretrained networks")
    parser.add_argument("--seed", type=int, default=0, help="seed of all training")
    parser.add_argument("--pretraining-steps", type=int, default=600, help="training steps of the base model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--num-updates", type=int, default=12, help="steps of each method")
    args = parser.parse_args()
    logging.getLogger("trl_distreward").setLevel(logging.INFO)
    logging.getLogger("trl_distreward").addHandler(logging.StreamHandler())
    pool, times = prepare_pool(args.cache, args.seed, args.pretraining_steps)
    digits = prepare(args.cache, args.seed, args.pretraining_steps)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    methods = {name: METHODS[name] for name in args.methods}
    rows = run_methods(digits, pool, times, args.output_dir, methods, seed=args.seed, max_steps=args.num_updates)
    (args.output_dir / "merge.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = table(rows)
    (args.output_dir / "merge.md").write_text(f"# Digits, merged\n\n{text}\n")
    print(f"\n{text}\n\nWritten to {args.output_dir}.")


if __name__ == "__main__":
    main()
