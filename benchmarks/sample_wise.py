# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
What a reward of single images does to a distribution: digits trained on it alone, on the distance alone, and on both.

    OMP_NUM_THREADS=1 python benchmarks/sample_wise.py

The sample-wise reward is a classifier's log-odds of the digit that was asked for, which stands for a preference score.
Everything but `reward_weights` is the same: the rate, the rolling reference set, one image a subset, each reward
normalized before they are added, the images generated. Recall, coverage, precision and density are measured under the
ODE in the features of a classifier that no reward sees, against the real training images.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from runs import Digits, parse_args, run, table, write
from torch import Tensor, nn

from trl_distreward import precision_recall_density_coverage

ARMS: dict[str, list[float]] = {  # weights of the distance and of the sample-wise reward
    "sample-wise": [0.0, 1.0],
    "distribution": [1.0, 0.0],
    "mixed": [1.0, 0.5],
}
MANIFOLD = ("recall", "coverage", "precision", "density")
COLUMNS = [f"{name} ode" for name in ("fd_heldout", "fd_reward", *MANIFOLD, "log_odds", "accuracy")]


class LogOdds:
    """Log-odds that a classifier gives the digit that was asked for, of each image."""

    __name__ = "log_odds"

    def __init__(self, classifier: nn.Module):
        self.classifier = classifier

    @torch.no_grad()
    def __call__(self, images: Tensor, conditions: Tensor, **kwargs: Any) -> Tensor:
        logits, asked = self.classifier(images), conditions[:, None].to(images.device)
        return logits.gather(1, asked)[:, 0] - logits.scatter(1, asked, -torch.inf).logsumexp(dim=1)


class MeanOf:
    """Mean of a sample-wise reward, as a metric."""

    def __init__(self, reward: LogOdds):
        self.reward = reward
        self.reset()

    def reset(self) -> None:
        self.values: list[Tensor] = []

    def update(self, images: Tensor, conditions: Tensor) -> None:
        self.values.append(self.reward(images=images, conditions=conditions))

    def compute(self) -> float:
        return torch.cat(self.values).mean().item()


class Manifold:
    """One of precision, recall, density and coverage, as a metric."""

    def __init__(self, name: str, classifier: Any, real: Tensor):
        self.name, self.classifier, self.real = name, classifier, real
        self.reset()

    def reset(self) -> None:
        self.features: list[Tensor] = []

    @torch.no_grad()
    def update(self, images: Tensor, conditions: Tensor) -> None:
        self.features.append(self.classifier.last_features(images))

    def compute(self) -> float:
        return precision_recall_density_coverage(self.real, torch.cat(self.features))[self.name]


@dataclass
class JudgedDigits(Digits):
    """Digits whose diversity is evaluated as well."""

    def reward_of_images(self) -> LogOdds:
        return LogOdds(self.spaces["last"].__self__)

    def eval_metrics(self) -> dict[str, Any]:
        with torch.no_grad():
            real = self.heldout.last_features(train_images())
        manifold = {name: Manifold(name, self.heldout, real) for name in MANIFOLD}
        return super().eval_metrics() | manifold | {"log_odds": MeanOf(self.reward_of_images())}


def train_images() -> Tensor:
    from digits import NUM_TRAIN, load_digits  # beside runs.py's own import of it

    return load_digits()[0][:NUM_TRAIN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of all arms")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parse_args(parser, __file__, seeds=[0, 10], budget=8_700, data=("digits",))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ["base", *args.arms]}
    for seed in args.seeds:
        prepared = JudgedDigits(**vars(args.prepare(seed)))
        for name in runs:
            settings = {
                "learning_rate": args.learning_rate,
                "reference_update": "rolling",
                "reward_weights": ARMS.get(name),
                "multi_objective_aggregation": "normalize_then_sum",
                "eval_samplers": ["ode"],
                "num_eval_images": 1000,
                "timestep_fraction": 0.5,
            }
            budget = 0 if name == "base" else args.budget
            runs[name].append(run(prepared, seed, budget, others=[prepared.reward_of_images()], **settings))
            print(seed, name, {key: round(value, 3) for key, value in runs[name][-1].items()}, flush=True)
            write(args.output, args, runs=runs)
    print(table(runs, COLUMNS))


if __name__ == "__main__":
    main()
