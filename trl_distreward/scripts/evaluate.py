# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Measures how far generated images are from real ones.

    trl-distreward evaluate --model org/pipeline --real imagenet256.npz
    trl-distreward evaluate --model samples.npz --real VIRTUAL_imagenet256_labeled.npz --metrics fid precision recall
    trl-distreward evaluate --model images/ --real inception.safetensors dinov2.safetensors \\
        --feature-extractor inception dinov2
    trl-distreward evaluate --compare before.json after.json
    torchrun --standalone --nproc_per_node 8 -m trl_distreward.scripts.evaluate --model org/pipeline --real real.npz

A pipeline generates its images first, into --work-dir; killed at any moment, the same command goes on where it was.
Image i depends on the seed and i alone, so that any number of processes makes the same images, up to the rounding of
the device's kernels. The result is a table in the terminal, a report in JSON, and on request Markdown, an ADM sample
file of the images, and an entry in a model card.
"""

import argparse
import gc
import platform
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from .. import __version__
from ..evaluation import reports
from ..evaluation.files import write_json, written_whole
from ..evaluation.generated import LABELS, GenerationPlan, generate_shards, save_shards_as_npz
from ..evaluation.measure import LOGIT_METRICS, FeatureSpace, takes_logits
from ..evaluation.real import RealPath
from ..evaluation.sources import ImageSource, open_images
from ..generation import SamplingSchedule
from ..metrics.scores import METRICS
from ..policies import as_policy, load_pipeline
from ..sampling import NOISE_SCHEDULES, ODE_SOLVERS, TIME_GRIDS
from .common import (
    EXTRACTOR_HELP,
    add_dataset_options,
    add_image_options,
    dataset_options,
    find_extractor,
    start_processes,
)

DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-distreward evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        help="Folder or Hub id of a pipeline; or generated images: a folder, an ADM sample (.npz), or a --work-dir's "
        "images.",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="Print the change from A to B in percent; each a report in JSON, or what --model takes.",
    )
    parser.add_argument(
        "--real",
        nargs="+",
        help="Real data, one for all extractors or one for each: a statistics file (.safetensors, .npz, or an EDM2 "
        ".pkl), a folder of images, an ADM reference batch (.npz), or a dataset. Moments alone serve only frechet.",
    )
    parser.add_argument(
        "--feature-extractor",
        nargs="+",
        default=["inception"],
        metavar="NAME",
        help=f"{EXTRACTOR_HELP} (default: inception).",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["frechet"],
        choices=METRICS,
        metavar="METRIC",
        help=f"Any of {', '.join(METRICS)} (default: frechet).",
    )
    parser.add_argument("--spread", type=int, default=0, help="Repeats from which each metric's spread is estimated.")
    parser.add_argument("--batch-size", type=int, default=64, help="Images at a time (default: 64).")
    add_generation_options(parser)
    add_output_options(parser)
    add_image_options(parser)
    add_dataset_options(parser, "--real")
    return parser


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("generation")
    options.add_argument("--num-images", type=int, help="Images of a pipeline (default: 50000).")
    options.add_argument(
        "--labels", default="balanced", choices=LABELS, help="All classes in turn, or drawn independently."
    )
    options.add_argument("--seed", type=int, default=0, help="Of the noise, of random labels, and of metrics.")
    options.add_argument("--sampler", default="sde", choices=("sde", "ode"), help="Sampler (default: sde).")
    options.add_argument("--num-inference-steps", type=int, default=250, help="Steps (default: 250).")
    options.add_argument("--guidance-scale", type=float, default=1.0, help="Classifier-free guidance; 1 is none.")
    options.add_argument("--noise-schedule", default="sit", choices=list(NOISE_SCHEDULES), help="Of the SDE.")
    options.add_argument("--noise-level", type=float, default=1.0, help="Of the SDE.")
    options.add_argument(
        "--last-step-size",
        type=float,
        help="Size of the SDE's last step, which has no noise (default: 0.04 on the uniform grid); 0 for a step like "
        "any other.",
    )
    options.add_argument("--solver", default="euler", choices=ODE_SOLVERS, help="Of the ODE.")
    options.add_argument(
        "--time-grid",
        default="uniform",
        choices=TIME_GRIDS,
        help="karras: EDM's noise levels, with --solver heun_sigma.",
    )
    options.add_argument("--time-shift", type=float, default=1.0, help="Resolution shift of the grid.")
    options.add_argument("--dtype", default="float32", choices=DTYPES, help="Of the pipeline (default: float32).")
    options.add_argument("--model-revision", help="Branch, tag or commit of a pipeline on the Hub.")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("output")
    options.add_argument("--output", default="evaluation.json", help="Report in JSON (default: evaluation.json).")
    options.add_argument("--markdown", metavar="FILE", help="Also write the table in Markdown.")
    options.add_argument("--save-npz", metavar="FILE", help="Also write a pipeline's images and labels as ADM does.")
    options.add_argument(
        "--update-card", metavar="FOLDER", help="Also write the results into the model card in this folder."
    )
    options.add_argument(
        "--work-dir",
        help="Where generated images and features are kept, shared by all processes. By default OUTPUT.work, which is "
        "removed at the end.",
    )


def schedule_of(arguments: argparse.Namespace) -> SamplingSchedule:
    uniform = arguments.time_grid == "uniform"
    last_step_size = (0.04 if uniform else None) if arguments.last_step_size is None else arguments.last_step_size
    return SamplingSchedule(
        arguments.num_inference_steps,
        arguments.sampler,
        noise_schedule=arguments.noise_schedule,
        noise_level=arguments.noise_level,
        last_step_size=last_step_size or None,
        solver=arguments.solver,
        time_shift=arguments.time_shift,
        time_grid=arguments.time_grid,
    )


def is_pipeline(model: str) -> bool:
    path = Path(model)
    return (path / "model_index.json").is_file() or (path.suffix != ".npz" and not path.exists())


def generate(arguments: argparse.Namespace, model: str, folder: Path) -> tuple[ImageSource, dict[str, Any]]:
    """The images of a pipeline, and the settings they were made with."""
    state, schedule = PartialState(), schedule_of(arguments)
    pipeline = load_pipeline(model, revision=arguments.model_revision, dtype=getattr(torch, arguments.dtype))
    policy = as_policy(pipeline, arguments.guidance_scale)
    plan = GenerationPlan(
        arguments.num_images or 50_000, schedule, arguments.labels, arguments.seed, arguments.batch_size
    )
    chosen = {"guidance_scale": arguments.guidance_scale, "dtype": arguments.dtype}
    policy.model.to(state.device)
    policy.to(state.device)
    images = generate_shards(policy, plan, folder, description=chosen)
    if arguments.save_npz and state.is_main_process:
        save_shards_as_npz(images, arguments.save_npz, plan.conditions(policy.num_conditions))
    return images, images.settings


def generated_images(arguments: argparse.Namespace, model: str, work_dir: Path) -> tuple[ImageSource, dict[str, Any]]:
    if is_pipeline(model):
        images, settings = generate(arguments, model, work_dir / "images")
        gc.collect()  # the pipeline's memory, before extractors take theirs
        torch.cuda.empty_cache()
        return images, settings
    for option in ("save_npz", "num_images"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is of a pipeline's images, but {model} holds images: leave it out."
            )
    images = open_images(model)
    return images, getattr(images, "settings", {})


def feature_spaces(arguments: argparse.Namespace) -> list[FeatureSpace]:
    """Every extractor with its real data, found to fit before anything is generated."""
    names, reals = arguments.feature_extractor, arguments.real or []
    if len(reals) not in (1, len(names)):
        raise ValueError(
            f"--real names {len(reals)} sets for {len(names)} feature extractors: give one for all or one for each."
        )
    extractors = [find_extractor(name) for name in names]
    some_take_logits = any(map(takes_logits, extractors))
    spaces = []
    for extractor, real in zip(extractors, reals * len(names) if len(reals) == 1 else reals, strict=True):
        open_real = cache(partial(open_images, real, **dataset_options(arguments)))
        metrics = arguments.metrics
        if some_take_logits and not takes_logits(extractor):
            metrics = [metric for metric in metrics if metric not in LOGIT_METRICS]
        space = FeatureSpace(extractor, RealPath.look_at(real, extractor.name, extractor.resize), metrics, open_real)
        space.check()
        spaces.append(space)
    return spaces


def evaluate(arguments: argparse.Namespace, model: str, work_dir: Path) -> dict[str, Any]:
    """The report of one model, in the main process; all call it."""
    spaces = feature_spaces(arguments)
    images, settings = generated_images(arguments, model, work_dir)
    options = {
        "batch_size": arguments.batch_size,
        "resize": arguments.resize,
        "skip_corrupt": arguments.skip_corrupt,
        "num_workers": arguments.num_workers,
    }
    results = [
        space.measure(images, work_dir, seed=arguments.seed, spread=arguments.spread, **options) for space in spaces
    ]
    if not PartialState().is_main_process:
        return {}
    return {
        "model": model,
        "images": min(result["images"] for result in results if result),
        "image_resize": arguments.resize,
        "skip_corrupt": arguments.skip_corrupt,
        "settings": settings,
        "results": results,
        "library": f"trl-distreward {__version__}, torch {torch.__version__}, python {platform.python_version()}",
    }


def compare(arguments: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Both reports and what changed, in the main process; all call it."""
    if arguments.save_npz or arguments.update_card:
        raise ValueError("--save-npz and --update-card are for one --model: leave them out of --compare.")
    before, after = (
        reports.read_report(given) if given.endswith(".json") else evaluate(arguments, given, work_dir / name)
        for given, name in zip(arguments.compare, ("before", "after"), strict=True)
    )
    if not PartialState().is_main_process:
        return {}
    changes = reports.compare_reports(before, after)
    Console().print(reports.change_table(before, after, changes))
    if arguments.markdown:
        write_text(arguments.markdown, reports.change_markdown(before, after, changes))
    return {"before": before, "after": after, "changes": [change.entry for change in changes]}


def present(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Shows a report, and writes what was asked for beside the JSON."""
    Console().print(reports.report_table(report))
    for message in (m for result in report["results"] for m in result["skipped"]):
        print(f"Skipped: {message}")
    if arguments.markdown:
        write_text(arguments.markdown, reports.report_markdown(report))
    if arguments.update_card:
        reports.update_card(arguments.update_card, report)


def write_text(path: str, text: str) -> None:
    with written_whole(path, "w") as file:
        file.write(text)


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    state = start_processes()
    work_dir = Path(arguments.work_dir or f"{arguments.output}.work")
    if arguments.compare:
        report = compare(arguments, work_dir)
    else:
        report = evaluate(arguments, arguments.model, work_dir)
    if state.is_main_process:
        if not arguments.compare:
            present(arguments, report)
        write_json(arguments.output, report)
        if arguments.work_dir is None:
            shutil.rmtree(work_dir, ignore_errors=True)
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
