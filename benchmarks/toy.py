# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Pictures for docs/concepts.md, on points of a plane: what a reward of single images and a distance do to a
distribution, and paths of the ODE and the SDE.

    OMP_NUM_THREADS=1 python benchmarks/toy.py

Real points lie around eight places of a ring, all equally likely. The generator, an MLP trained by flow matching on a
skewed set, makes some places too often. The same policy gradient then trains it twice with equally many points: on a
score of single points that prefers one place, and on the MMD of the whole set. A point is an "image" of two pixels,
rounded to 8 bits like any other.
"""

import argparse
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from results import markdown, rounded, write_table
from torch import Tensor, nn

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    KernelDistance,
    SubsetReplaceReward,
    precision_recall_density_coverage,
)
from trl_distreward.generation import SamplingSchedule, sample
from trl_distreward.policies import to_uint8
from trl_distreward.sampling import gaussian_noise, rollout, time_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from custom_policy import DigitsPolicy  # noqa: E402

MODES, RADIUS, SPREAD, EDGE = 8, 1.2, 0.09, 2.0  # pixels cover -EDGE to EDGE
ANGLES = torch.arange(MODES) * 2 * torch.pi / MODES
PLACES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (8, 2)
SKEW = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 1.0, 2.0, 3.0])  # weights in the generator's training set


def points_about_places(count: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    places = PLACES[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return places + SPREAD * torch.randn(count, 2, generator=generator)


class PlaneMLP(nn.Module):
    """Velocity of points at given times."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(-1, 3, device=t.device)
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)).view_as(x)


class PlanePolicy(DigitsPolicy):
    """A policy whose samples `(B, 2, 1, 1)` are points."""

    num_conditions = 1

    def encode(self, conditions: Any) -> dict[str, Tensor]:
        return {"labels": torch.as_tensor(conditions)}

    def noise(self, conditions: Any, generator: Any = None) -> Tensor:
        return gaussian_noise((len(conditions), 2, 1, 1), generator, torch.device("cpu"), torch.float32)

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, t).float()

    def decode(self, x: Tensor) -> Tensor:
        return (x / (2 * EDGE) + 0.5).clamp(0, 1)


def coordinates(images: Tensor) -> Tensor:
    """Turns uint8 images `(B, 2, 1, 1)` into points `(B, 2)`."""
    return (images.float().flatten(1) / 255 - 0.5) * (2 * EDGE)


def score(images: Tensor, **kwargs: Any) -> Tensor:
    """Scores points by closeness to one of the eight places."""
    return -(coordinates(images) - PLACES[0]).norm(dim=1)


def pretrain(policy: PlanePolicy, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x_0 = points_about_places(512, SKEW, generator).view(-1, 2, 1, 1)
        x_1, t = torch.randn(x_0.shape, generator=generator), torch.rand(512, generator=generator)
        wide = t.view(-1, 1, 1, 1)
        velocity = policy.velocity(policy.model, (1 - wide) * x_0 + wide * x_1, t, {})
        optimizer.zero_grad()
        (velocity - (x_1 - x_0)).square().mean().backward()
        optimizer.step()
        schedule.step()


def train(base: PlanePolicy, reward: Any, updates: int) -> PlanePolicy:
    """Trains a copy of the base generator for `updates` policy gradients with 256 points each."""
    policy = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistributionRewardTrainer(
            model=policy,
            reward_funcs=reward,
            args=DiffusionDistributionConfig(
                output_dir=folder,
                loss_type="grpo",
                max_steps=updates,
                learning_rate=3e-4,
                reference_set_size=1000,
                num_subsets=256,
                num_inference_steps=12,
                last_step_size=0,
                rollout_batch_size=256,
                per_device_train_batch_size=4096,
                per_device_eval_batch_size=1000,
                save_strategy="no",
                report_to="none",
                logging_steps=50,
                use_cpu=True,
                disable_tqdm=True,
                log_samples=False,
                seed=0,
            ),
        )
        trainer.train()
    return policy


def generate(policy: PlanePolicy, count: int, seed: int) -> Tensor:
    """Generates points `(count, 2)` by the ODE, rounded as 8-bit images."""
    generator, schedule = torch.Generator().manual_seed(seed), SamplingSchedule(50, "ode")
    x = sample(policy, policy.model, torch.zeros(count), schedule, generator).sample
    return coordinates(to_uint8(policy.decode(x)))


def judge(points: Tensor, real: Tensor, distance: KernelDistance) -> dict[str, float]:
    """`distance` is fitted to `points`."""
    distance.fit(points)
    nearest = torch.cdist(points, PLACES).min(dim=1)
    shares = torch.bincount(nearest.indices[nearest.values < 4 * SPREAD], minlength=MODES) / len(points)
    manifold = precision_recall_density_coverage(real, points)
    return {
        "score": -(points - PLACES[0]).norm(dim=1).mean().item(),
        "mmd": 1000 * distance.value,
        "rarest": shares.min().item(),
        "commonest": shares.max().item(),
        "coverage": manifold["coverage"],
        "precision": manifold["precision"],
    }


# ---- pictures ----


def plane(axes: Any, title: str) -> None:
    axes.set(title=title, xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    axes.scatter(*PLACES.T, s=420, facecolors="none", edgecolors="0.75", linewidths=0.8)


def draw_sets(sets: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(2.25 * len(sets), 2.55), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(sets)), sets.items(), strict=True):
        plane(axes, name)
        axes.scatter(*points[:1000].T, s=3, alpha=0.4, linewidths=0, color="C0")
    figure.savefig(path, dpi=100)


def draw_paths(policy: PlanePolicy, path: Path, steps: int = 50) -> None:
    """Draws the ODE's path and five of the SDE's from each of the same four points of noise."""
    times = time_grid(steps)
    starts = policy.noise(torch.zeros(4), torch.Generator().manual_seed(3))
    cond = policy.encode(torch.zeros(1))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return policy.velocity(policy.model, x, t, cond)

    figure = Figure(figsize=(9, 3.3), layout="constrained")
    levels = {"ODE: one path each": (0.0, 1), "SDE, η = 0.3: five paths each": (0.3, 5), "SDE, η = 1": (1.0, 5)}
    for axes, (title, (level, repeats)) in zip(figure.subplots(1, 3), levels.items(), strict=True):
        x, generator = starts.repeat_interleave(repeats, dim=0), torch.Generator().manual_seed(0)
        every = range(steps + 1)
        path_of = rollout(
            velocity, x, times, noise_schedule="sit", noise_level=level, keep_states=every, generator=generator
        )
        lines = torch.stack([path_of.states[i] for i in every]).flatten(2)  # (steps + 1, paths, 2)
        plane(axes, title)
        for i in range(lines.shape[1]):
            colour = f"C{i // repeats}"
            axes.plot(*lines[:, i].T, color=colour, linewidth=0.7, alpha=0.8 if repeats == 1 else 0.45)
            axes.scatter(*lines[-1, i], s=14, color=colour, zorder=3)
        axes.scatter(*starts.flatten(1).T, s=22, marker="x", color="black", zorder=4, linewidths=1)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining-steps", type=int, default=4000, help="steps of flow matching")
    parser.add_argument("--updates", type=int, default=150, help="updates of 256 points with each reward")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder for the pictures")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    real, real_again = (points_about_places(count, torch.ones(MODES), generator) for count in (2000, 2000))
    base = PlanePolicy(PlaneMLP())
    pretrain(base, args.pretraining_steps, generator)
    gaussian = partial(KernelDistance, kernel="gaussian", bandwidths=(0.2, 0.5))
    policies = {
        "base": base,
        "a score of single points": train(base, score, args.updates),
        "a distance of the set": train(base, SubsetReplaceReward(coordinates, real, gaussian), args.updates),
    }
    sets = {name: generate(policy, 2000, seed=1) for name, policy in policies.items()} | {"real": real_again}
    rows = [{"points": name, **rounded(judge(points, real, gaussian(real)))} for name, points in sets.items()]
    print(markdown([*rows[0]], [[str(value) for value in row.values()] for row in rows]))
    args.images.mkdir(parents=True, exist_ok=True)
    draw_sets(sets, args.images / "collapse.png")
    draw_paths(base, args.images / "paths.png")
    write_table(args.output, rows, seeds=[0])


if __name__ == "__main__":
    main()
