# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Measure how far generated images are from real ones.

    trl-distreward evaluate --model org/pipeline --real imagenet256.npz
    trl-distreward evaluate --model samples.npz --real VIRTUAL_imagenet256_labeled.npz --metrics frechet recall
    trl-distreward evaluate --model images/ --feature-extractor inception dinov2 --real inception.safetensors \\
        dinov2.safetensors
    trl-distreward evaluate --compare before.json after.json
    torchrun --standalone --nproc_per_node 8 -m trl_distreward evaluate --model org/pipeline --real real.npz

Killed at any time, the same command continues. An image of a pipeline depends on the seed and its index alone, so any
number of processes generates the same images, up to the rounding of the device.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from .. import __version__
from ..evaluation.features import collect_features, start_processes
from ..evaluation.generated import GeneratedImages
from ..evaluation.real import RealSet
from ..evaluation.report import check_comparable, markdown_table
from ..evaluation.sources import ImageSource, open_images
from ..files import write_json
from ..generation import SOLVERS, TIME_GRIDS, SamplingSchedule
from ..metrics.scores import METRICS
from ..policies import as_policy, load_pipeline
from ..sampling import NOISE_SCHEDULES
from . import cli
from .common import EXTRACTOR_HELP, Options, add_image_options, find_extractor, image_options


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("evaluate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub id of a pipeline, or images: a folder or an ADM sample (.npz)")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print the changes from one report to another")
    add, metrics = parser.add_argument, f"any of {', '.join(METRICS)} (default: frechet)"
    real = "statistics (.safetensors, .npz, EDM2's .pkl) or images (folder, .npz, dataset), for all extractors or each"
    add("--real", nargs="+", default=[], help=real)
    add("--other-real", nargs="+", default=[], help="other real images, or statistics of them, for frechet_ratio")
    add("--feature-extractor", nargs="+", default=["inception"], metavar="NAME", help=EXTRACTOR_HELP)
    add("--metrics", nargs="+", default=["frechet"], choices=METRICS, metavar="METRIC", help=metrics)
    add("--spread", type=int, default=0, help="number of repeats from which standard deviations are estimated")
    add("--output", default="evaluation.json", help="report in JSON (default: evaluation.json)")
    add_image_options(parser)
    add = parser.add_argument_group("images of a pipeline").add_argument
    add("--num-images", type=int, default=50_000, help="number of images (default: 50000)")
    add("--labels", default="balanced", choices=("balanced", "random"), help="equally many of each class, or random")
    add("--seed", type=int, default=0, help="seed of the noise, of random labels and of metrics")
    add("--dtype", default="float32", choices=cli.DTYPES, help="dtype of the pipeline (default: float32)")
    add("--sampler", default="ode", choices=("sde", "ode"), help="sampler (default: ode, as in training)")
    add("--num-inference-steps", type=int, default=20, help="number of steps (default: 20)")
    add("--guidance-scale", type=float, default=1.0, help="scale of classifier-free guidance (default: 1, none)")
    add("--guidance-channels", type=int, help="guide the first channels only; SiT guides 3")
    add("--noise-schedule", default="sit", choices=list(NOISE_SCHEDULES), help="noise of the SDE (default: sit)")
    add("--noise-level", type=float, default=1.0, help="noise level of the SDE (default: 1)")
    last = "noiseless last step of the SDE, 0 for none (default: auto, 0.04 on even steps, else the grid's own)"
    add("--last-step-size", type=step_size, default="auto", metavar="SIZE", help=last)
    add("--solver", default="auto", choices=SOLVERS, help="solver of the ODE (default: auto, the pipeline's own)")
    add("--time-grid", default="auto", choices=TIME_GRIDS, help="times (default: auto, the pipeline's own)")
    return parser


def step_size(text: str) -> float | str:
    return text if text == "auto" else float(text)


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.compare:
        before, after = (json.loads(Path(path).read_text()) for path in arguments.compare)
        check_comparable(before, after)
        print(markdown_table(before, after))
        return
    state, folder = start_processes(), Path(arguments.work_dir or f"{arguments.output}.work")
    opening, options = image_options(arguments)
    reals, others = open_reals(arguments, opening), open_others(arguments, opening)
    for i, real in enumerate([*reals, *others]):
        real.collect(folder / f"real-{i}", **options)
    images = open_model(arguments, state)
    networks = {name: real.extractor for name, real in zip(arguments.feature_extractor, reals, strict=True)}
    collected = collect_features(images, networks, folder / "generated", **options)
    if state.is_main_process:
        rows = [collected.features(name) for name in networks]
        other_real = [each.statistics for each in others] or [None] * len(reals)
        sets, repeats = zip(reals, rows, other_real, strict=True), (arguments.seed, arguments.spread)
        report = {
            "model": arguments.model,
            "images": len(rows[0]),
            "resize": arguments.resize,
            "skipped": collected.skipped,
            "settings": images.description,
            "results": [real.compare(row, other, *repeats) for real, row, other in sets],
            "library": f"trl-distreward {__version__}, torch {torch.__version__}",
        }
        write_json(arguments.output, report)
        print(markdown_table(report))
        if arguments.work_dir is None:
            shutil.rmtree(folder)
    state.wait_for_everyone()


def paths_of(option: str, paths: list[str], names: list[str]) -> list[str]:
    """Paths of an option, one for each feature extractor; a single one is for all."""
    if len(paths) not in (1, len(names)):
        raise ValueError(f"{option} names {len(paths)} sets for {len(names)} feature extractors: give one for each.")
    return paths * len(names) if len(paths) == 1 else paths


def open_others(arguments: argparse.Namespace, options: Options) -> list[RealSet]:
    """Opens the other real images of `frechet_ratio`, for each feature extractor."""
    if "frechet_ratio" not in arguments.metrics:
        return []
    names = arguments.feature_extractor
    paths = paths_of("--other-real", arguments.other_real, names)
    pairs = zip(names, paths, strict=True)
    return [RealSet(path, find_extractor(name), ["frechet"], **options) for name, path in pairs]


def open_reals(arguments: argparse.Namespace, options: Options) -> list[RealSet]:
    """Opens the real data of each feature extractor."""
    names, reals = arguments.feature_extractor, []
    for name, path in zip(names, paths_of("--real", arguments.real, names), strict=True):
        extractor = find_extractor(name)
        has_logits = getattr(extractor, "output", None) == "pool3"
        metrics = [metric for metric in arguments.metrics if metric != "inception_score" or has_logits]
        reals.append(RealSet(path, extractor, metrics, **options))
    if "inception_score" in arguments.metrics and not any("inception_score" in real.metrics for real in reals):
        raise ValueError("inception_score needs Inception's logits: add inception to --feature-extractor.")
    return reals


def open_model(arguments: argparse.Namespace, state: PartialState) -> ImageSource:
    """Opens the images to evaluate; those of a pipeline are generated when they are read."""
    path = Path(arguments.model)
    if path.exists() and not (path / "model_index.json").is_file():
        return open_images(path)
    names = ("sampler", "noise_schedule", "noise_level", "last_step_size", "solver", "time_grid")
    options = {name: getattr(arguments, name) for name in names}
    schedule = SamplingSchedule(arguments.num_inference_steps, **options)
    guidance = {"guidance_scale": arguments.guidance_scale}
    if arguments.guidance_channels is not None:
        guidance["guidance_channels"] = arguments.guidance_channels
    policy = as_policy(load_pipeline(arguments.model, dtype=getattr(torch, arguments.dtype)), **guidance)
    policy.model.to(state.device)
    policy.to(state.device)
    settings = {"dtype": arguments.dtype, **guidance}
    return GeneratedImages(policy, arguments.num_images, schedule, arguments.labels, arguments.seed, settings)
