# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The main job in minutes on a CPU: a small SiT on scikit-learn's 1,797 real 8x8 digits, improved by a distribution-wise
reward.

    python examples/digits.py
    python examples/digits.py --seed 10 --output-dir outputs/digits-10
    trl-distreward report outputs/digits/transport

Two estimators are compared: transport, the default, and the paper's policy gradient. The reward sees one network's
features and class probabilities, and pixels. Another network is held out and judges the images.

Output folder: overview.png, report.json and report.md, before.png, and for each estimator its pipeline and
after_*.png.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits as load_sklearn_digits
from torch import Tensor, nn
from tqdm.auto import trange

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureDistance,
    FeatureStatistics,
    JointFeatures,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
    frechet_distance,
)
from trl_distreward.metrics import extract_features

NUM_TRAIN = 1200
METRICS = {
    "fd_reward": "distance_last",
    "fd_heldout": "heldout",
    "fd_pixel": "distance_pixels",
    "accuracy": "accuracy",
}


def load_digits() -> tuple[Tensor, Tensor]:
    """Loads uint8 images (1797, 1, 8, 8) and labels (1797,) in a fixed random order; 1,200 are for training."""
    digits = load_sklearn_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]
    return images[order], torch.from_numpy(digits.target)[order]


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers on uint8 images."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 4, 64)
        self.output = nn.Linear(64, 10)

    def convolved(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        x = F.max_pool2d(self.activation(self.conv1(x)), 2)
        return self.activation(self.conv2(x))  # (B, 2 width, 4, 4)

    def middle_features(self, images: Tensor) -> Tensor:
        return self.convolved(images).mean((2, 3))

    def last_features(self, images: Tensor) -> Tensor:
        return self.activation(self.hidden(F.max_pool2d(self.convolved(images), 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.last_features(images))

    def probabilities(self, images: Tensor) -> Tensor:
        return self(images).softmax(1)


def pixel_features(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 127.5 - 1


class Accuracy:
    """Share of generated images in which a classifier recognizes the requested class."""

    higher_is_better = True

    def __init__(self, classifier: nn.Module):
        self.classifier = classifier
        self.reset()

    def reset(self) -> None:
        self.right = self.total = 0

    @torch.no_grad()
    def update(self, images: Tensor, conditions: Tensor) -> None:
        self.right += (self.classifier(images).argmax(1) == conditions).sum().item()
        self.total += len(images)

    def compute(self) -> float:
        return self.right / self.total


def train_classifier(model: DigitClassifier, images: Tensor, labels: Tensor, seed: int, name: str) -> None:
    """Trains for 600 Adam steps on noisy digits."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in trange(600, desc=name, leave=False):
        index = torch.randint(0, len(images), (128,))
        noisy = images[index].float() + 12 * torch.randn(128, 1, 8, 8)
        loss = F.cross_entropy(model(noisy), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def new_sit() -> SiTTransformer2DModel:
    """Builds the generator."""
    return SiTTransformer2DModel(
        sample_size=8,
        in_channels=1,
        hidden_size=64,
        num_layers=4,
        num_attention_heads=4,
        num_classes=10,
        learn_sigma=False,
    )


def train_sit(
    new_model: Callable[[], SiTTransformer2DModel],
    images: Tensor,
    labels: Tensor,
    seed: int,
    steps: int,
    on_step: Callable[[int, SiTTransformer2DModel], None] | None = None,
) -> SiTTransformer2DModel:
    """
    Trains by flow matching in SiT's convention: time runs from noise (0) to data (1), velocity is data minus noise.

    `on_step` is called with the number of finished steps and the model.
    """
    torch.manual_seed(seed)
    model = new_model()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    model.train()
    for step in trange(steps, desc="Pretraining", leave=False):
        index = torch.randint(0, len(images), (128,))
        x = images[index].float() / 127.5 - 1
        noise = torch.randn_like(x)
        t = torch.sigmoid(torch.randn(128))
        wide = t.view(-1, 1, 1, 1)
        predicted = model(wide * x + (1 - wide) * noise, t, labels[index]).sample
        loss = F.mse_loss(predicted, x - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, model)
    return model.eval()


def cached(path: Path, model: nn.Module, train: Callable[[], None]) -> None:
    """Loads a network's weights from `path`, or trains the network and writes them."""
    if path.is_file():
        model.load_state_dict(load_file(path))
        model.eval()
        return
    train()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


def save_grid(images: Tensor, path: Path, scale: int = 6) -> None:
    """Writes uint8 images (100, 1, 8, 8) as ten rows of ten, one column per class."""
    padded = F.pad(images.view(10, 10, 8, 8), (1, 1, 1, 1), value=64)
    grid = padded.permute(0, 2, 1, 3).reshape(100, 100).numpy()
    Image.fromarray(np.kron(grid, np.ones((scale, scale), np.uint8))).save(path)


def sample_grid(pipeline: SiTPipeline, path: Path) -> None:
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(100)]
    images = pipeline(labels, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt")
    save_grid((images.images * 255).round().to(torch.uint8), path)


def evaluated(trainer: DistributionRewardTrainer, num_seeds: int) -> dict[str, Any]:
    """Computes mean and standard deviation of every metric over evaluations with different noise."""
    runs = [trainer.evaluate(), *(trainer.evaluate(seed=seed) for seed in range(1, num_seeds))]  # the first has seed 0

    def spread(key: str) -> dict[str, float]:
        values = [run[key] for run in runs]
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=min(1, len(values) - 1)))}

    return {name: spread(f"eval_ode_{key}") for name, key in METRICS.items()}


def report_table(report: dict) -> str:
    def cells(values: dict) -> str:
        return " | ".join(f"{values[name]['mean']:.3f} ± {values[name]['std']:.3f}" for name in METRICS)

    lines = [f"| | {' | '.join(METRICS)} |", "|---|" + "---|" * len(METRICS)]
    base = report["base"]
    lines.append(f"| before | {cells(base)} |")
    for stage, label in LABELS.items():
        lines.append(f"| {label} | {cells(report[stage])} |")
        change = [f"{report[stage][name]['mean'] / base[name]['mean'] - 1:+.1%}" for name in METRICS]
        lines.append(f"| change | {' | '.join(change)} |")
    lines.append(f"| real test images | {cells(report['floor'])} |")
    return "\n".join(lines)


def draw_overview(out: Path, report: dict[str, Any]) -> Path:
    """Draws samples before and after from the same noise, distances by update, and a table."""
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 3.2))
    titles = {"before": "before", **{f"after_{name}": f"after: {LABELS[name]}" for name in ESTIMATORS}}
    for axes, (name, title) in zip(above.subplots(1, len(titles)), titles.items(), strict=True):
        axes.imshow(Image.open(out / f"{name}.png"), cmap="gray")
        axes.set_title(title)
        axes.axis("off")
    curves, cells = below.subplots(1, 2, width_ratios=(4, 5))
    for colour, name in zip(("tab:blue", "tab:orange"), ESTIMATORS, strict=True):
        for key, style in (("distance_last", "--"), ("heldout", "-")):
            points = {each["step"]: each["values"][f"ode_{key}"] for each in report["evaluations"][name]}
            seen = "held out" if key == "heldout" else "rewarded"
            curves.plot(
                *zip(*points.items(), strict=True), style, marker=".", c=colour, label=f"{LABELS[name]}, {seen}"
            )
    curves.set(title="Fréchet distance from real digits", xlabel="update", ylim=(0, None))
    curves.legend(frameon=False, fontsize="small")
    rows = {"before": report["base"], **{LABELS[name]: report[name] for name in ESTIMATORS}}
    rows["real test digits"] = report["floor"]
    names = {"fd_heldout": "distance,\nheld out", "fd_pixel": "distance,\npixels", "accuracy": "right\ndigit"}
    values = [
        [f"{row[name]['mean']:.1%}" if name == "accuracy" else f"{row[name]['mean']:.2f}" for name in names]
        for row in rows.values()
    ]
    cells.axis("off")
    table = cells.table(values, rowLabels=list(rows), colLabels=list(names.values()), bbox=(0.3, 0.1, 0.7, 0.9))
    table.auto_set_font_size(False)
    table.set_fontsize(11)
    figure.savefig(out / "overview.png", dpi=80)
    return out / "overview.png"


@dataclass
class Digits:
    """
    A pretrained generator and what judges it.

    Attributes:
        base_path: folder of the generator.
        images: real training images.
        spaces, real: feature spaces of the reward, and statistics of the real images in them.
        heldout, real_heldout: network that no reward sees, and statistics of the real images in its last layer.
        floor: metrics of real test images.
    """

    base_path: Path
    images: Tensor
    spaces: dict[str, Callable[..., Tensor]]
    real: dict[str, FeatureStatistics]
    heldout: nn.Module
    real_heldout: FeatureStatistics
    floor: dict[str, dict[str, float]]

    def reward(self, **options: Any) -> SubsetReplaceReward:
        return SubsetReplaceReward(self.spaces, self.real, **{"space_weights": {"asked": 1.5}, **options})

    def eval_metrics(self) -> dict[str, Any]:
        return {
            "heldout": FeatureDistance(self.heldout.last_features, self.real_heldout),
            "accuracy": Accuracy(self.heldout),
        }


def prepare_pool(cache: Path, seed: int, pretraining_steps: int) -> tuple[list[Path], list[float]]:
    """
    Returns eight checkpoints of the generator's training, evenly spaced over its last seven twelfths, and their steps.

    Reads them from `cache`, or trains the generator; the last checkpoint is then where `prepare` looks for it.
    """
    times = [pretraining_steps * k // 12 for k in range(5, 13)]
    paths = {time: cache / f"pool-{seed}-{pretraining_steps}" / f"step-{time:04d}.safetensors" for time in times}
    if not paths[times[-1]].is_file():
        paths[times[-1]].parent.mkdir(parents=True, exist_ok=True)

        def keep(step: int, model: SiTTransformer2DModel) -> None:
            if step in paths:
                save_file(model.state_dict(), paths[step])

        images, labels = load_digits()
        model = train_sit(new_sit, images[:NUM_TRAIN], labels[:NUM_TRAIN], 3 + seed, pretraining_steps, keep)
        SiTPipeline(model).save_pretrained(cache / f"base-{seed}-{pretraining_steps}")
    return list(paths.values()), [float(time) for time in times]


def prepare(cache: Path, seed: int, pretraining_steps: int) -> Digits:
    """Reads the two classifiers and the generator from `cache`, or trains them."""
    images, labels = load_digits()
    train_images, train_labels = images[:NUM_TRAIN], labels[:NUM_TRAIN]
    test_images, test_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    judge, heldout = DigitClassifier(32, F.relu), DigitClassifier(24, F.gelu)
    for name, model, model_seed in (("judge", judge, 1 + seed), ("heldout", heldout, 2)):
        cached(
            cache / f"{name}-{model_seed}.safetensors",
            model,
            lambda m=model, s=model_seed, n=name: train_classifier(
                m, train_images, train_labels, s, f"Classifier {n}"
            ),
        )
    base_path = cache / f"base-{seed}-{pretraining_steps}"
    if not base_path.is_dir():
        SiTPipeline(train_sit(new_sit, train_images, train_labels, 3 + seed, pretraining_steps)).save_pretrained(
            base_path
        )
    # class probabilities joined with labels tell whether images show the requested digits; features alone do not
    asked = JointFeatures(judge.probabilities, num_classes=10, scale=1)
    spaces = {"last": judge.last_features, "middle": judge.middle_features, "pixels": pixel_features, "asked": asked}
    with torch.no_grad():
        real = {
            name: FeatureStatistics.from_features(extract_features(extract, train_images, train_labels))
            for name, extract in spaces.items()
        }
        real_heldout = FeatureStatistics.from_features(heldout.last_features(train_images))
        test = {
            "fd_reward": (judge.last_features, real["last"]),
            "fd_heldout": (heldout.last_features, real_heldout),
            "fd_pixel": (pixel_features, real["pixels"]),
        }
        floor = {
            name: {"mean": frechet_distance(FeatureStatistics.from_features(f(test_images)), r), "std": 0.0}
            for name, (f, r) in test.items()
        }
        accuracy = (heldout(test_images).argmax(1) == test_labels).double().mean().item()
        floor["accuracy"] = {"mean": accuracy, "std": 0.0}
    return Digits(base_path, train_images, spaces, real, heldout, real_heldout, floor)


ESTIMATORS: dict[str, dict[str, Any]] = {
    "transport": {"learning_rate": 3e-4},
    "policy_gradient": {"loss_type": "grpo", "learning_rate": 1e-4, "noise_level": 0.7, "last_step_size": 0},
}
LABELS = {"transport": "transport", "policy_gradient": "policy gradient"}


def build_trainer(digits: Digits, args: argparse.Namespace, name: str) -> DistributionRewardTrainer:
    return DistributionRewardTrainer(
        model=str(digits.base_path),
        reward_funcs=digits.reward(space_weights={"asked": args.label_weight}),
        args=DiffusionDistributionConfig(
            output_dir=str(args.output_dir / name),
            seed=args.seed,
            max_steps=args.num_updates,
            reference_set_size=1000,
            num_subsets=256,
            num_inference_steps=10,
            num_eval_images=2000,
            rollout_batch_size=256,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=500,
            eval_strategy="steps",
            eval_steps=args.num_updates // 3 + 1,  # twice; the end is evaluated below
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            logging_steps=5,
            **ESTIMATORS[name],
        ),
        eval_metrics=digits.eval_metrics(),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/digits"), help="folder for all output")
    parser.add_argument("--seed", type=int, default=0, help="seed of all training")
    parser.add_argument("--num-updates", type=int, default=40, help="updates with each estimator")
    parser.add_argument("--pretraining-steps", type=int, default=600, help="training steps of the base model")
    parser.add_argument(
        "--label-weight", type=float, default=1.5, help="weight in the reward of showing the right digit"
    )
    parser.add_argument("--eval-seeds", type=int, default=2, help="evaluations with different noise")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.getLogger("trl_distreward").setLevel(logging.INFO)
    logging.getLogger("trl_distreward").addHandler(logging.StreamHandler())
    started, out = time.perf_counter(), args.output_dir
    digits = prepare(out / "cache", args.seed, args.pretraining_steps)
    report: dict[str, Any] = {"evaluations": {}}
    seconds = {"pretraining": time.perf_counter() - started}
    for name in ESTIMATORS:
        trainer = build_trainer(digits, args, name)
        if "base" not in report:
            report["base"] = evaluated(trainer, args.eval_seeds)
            sample_grid(trainer.policy.pipeline, out / "before.png")
        else:
            trainer.evaluate()  # for the report of this run
        training = time.perf_counter()
        trainer.train()
        seconds[name] = time.perf_counter() - training
        report[name] = evaluated(trainer, args.eval_seeds)
        report["evaluations"][name] = trainer.run_record.evaluations
        trainer.save_model(str(out / name / "pipeline"))
        sample_grid(SiTPipeline.from_pretrained(out / name / "pipeline"), out / f"after_{name}.png")
    report["floor"] = digits.floor
    report["seconds"] = seconds | {"total": time.perf_counter() - started}
    report["settings"] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    table = report_table(report)
    (out / "report.md").write_text(f"# Digits\n\n{table}\n")
    print(f"\n{table}\n\nWritten to {out} in {report['seconds']['total']:.0f} s. All of it at a glance:")
    print(f"  {draw_overview(out, report)}\nA run as a page:")
    for name in ESTIMATORS:
        print(f"  trl-distreward report {out / name}")


if __name__ == "__main__":
    main()
