# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Judges trained colour generators by what no reward saw, under ODE and SDE, and draws samples before and after.

    OMP_NUM_THREADS=1 python benchmarks/paper colour --data cifar --seeds 0
    OMP_NUM_THREADS=1 python benchmarks/colour.py outputs/paper/colour/*/0

Needs the data and packages of `cifar.py`. FDr^k is the mean over three feature spaces of the Fréchet distance from
2,500 test images divided by that of as many other test images. The grid is of the first generator.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from cifar import NUM_SEEN, Colour, efficientnet_features, judge, pixel_features
from cifar_generator import load_generator
from diffusers import DDIMPipeline
from PIL import Image, ImageDraw
from results import rounded, write_table
from torch import Tensor

from trl_distreward import FeatureStatistics, SamplingSchedule, as_policy, feature_metrics, generate_images
from trl_distreward.metrics import extract_features

GRID = Path(__file__).resolve().parents[1] / "docs" / "results" / "images" / "colour.png"
METRICS = ("frechet", "frechet_ratio", "precision", "recall")


def images_of(pipeline: DDIMPipeline, sampler: str, count: int, seed: int) -> Tensor:
    """Generates uint8 images `(count, 3, 32, 32)` of all classes in turn, in 20 steps."""
    policy = as_policy(pipeline)
    policy.model.to(memory_format=torch.channels_last)  # takes 0.7 times as long
    schedule, labels = SamplingSchedule(20, sampler), torch.arange(count) % 10
    return torch.cat([images for images, _ in generate_images(policy, labels, schedule, seed=seed, batch_size=32)])


def judged(images: Tensor, colour: Colour) -> dict[str, float]:
    """Metrics by feature space, and those of all spaces."""
    found: dict[str, float] = {}
    spaces = {
        "resnet56": colour.heldout.last_features,
        "efficientnet": efficientnet_features,
        "pixels": pixel_features,
    }
    for space, features in spaces.items():
        real, other, generated = (extract_features(features, x) for x in (colour.unseen, colour.images, images))
        statistics = FeatureStatistics.from_features(other)
        values = feature_metrics(real, generated, METRICS, other_real=statistics)
        found |= {f"{metric} {space}": value for metric, value in values.items()}
    found["FDr^k"] = sum(found[f"frechet_ratio {space}"] for space in spaces) / len(spaces)
    mean, real_mean = (x.double().mean((0, 2, 3)) / 255 for x in (images, colour.unseen))
    return found | {"mean colour off": (mean - real_mean).abs().max().item()}


def draw(before: DDIMPipeline, after: DDIMPipeline, rows: int = 4, scale: int = 2) -> None:
    """Draws samples of both from the same noise side by side, a column for each class."""
    width, height = 10 * 32 * scale, rows * 32 * scale
    canvas = Image.new("RGB", (2 * width + 16, height + 18), "white")
    for index, (name, pipeline) in enumerate({"before": before, "after": after}.items()):
        images = images_of(pipeline, "ode", 10 * rows, seed=0).view(rows, 10, 3, 32, 32)
        grid = Image.fromarray(images.permute(0, 3, 1, 4, 2).reshape(rows * 32, 320, 3).numpy())
        canvas.paste(grid.resize((width, height), Image.Resampling.NEAREST), (index * (width + 16), 18))
        ImageDraw.Draw(canvas).text((index * (width + 16), 2), name, fill="black")
    canvas.quantize(256).save(GRID, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="trained generators")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of images and judges")
    parser.add_argument("--samplers", nargs="*", default=["ode", "sde"], help="none: only draws")
    args = parser.parse_args()
    colour, base = judge(args.data), load_generator()
    trained = {f"{path.parent.name}, seed {path.name}": DDIMPipeline.from_pretrained(path) for path in args.folders}
    draw(base, next(iter(trained.values())))
    rows: list[dict[str, Any]] = []
    for name, pipeline in {"before": base, **trained}.items():
        for sampler in args.samplers:
            found = judged(images_of(pipeline, sampler, NUM_SEEN, seed=1), colour)
            rows += [{"arm": name, "metric": f"{k} {sampler}", "mean": rounded(v)} for k, v in found.items()]
            print("RESULT", name, sampler, {k: round(v, 3) for k, v in found.items()}, flush=True)
            write_table(Path(__file__).with_suffix(".json"), rows)


if __name__ == "__main__":
    main()
