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
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from .. import __version__
from ..evaluation import reports
from ..evaluation.collect import CollectedFeatures
from ..evaluation.generated import LABELS, GenerationPlan, generate_shards, remove_shards, save_shards_as_npz
from ..evaluation.measure import LOGIT_METRICS, FeatureSpace, takes_logits
from ..evaluation.real import RealPath
from ..evaluation.sources import ImageSource, ShardedImages, open_images
from ..files import write_json, written_whole
from ..generation import TIME_GRIDS, SamplingSchedule
from ..metrics.scores import METRICS
from ..policies import as_policy, load_pipeline
from ..sampling import NOISE_SCHEDULES, ODE_SOLVERS
from . import cli
from .common import (
    EXTRACTOR_HELP,
    add_dataset_options,
    add_image_options,
    check_file_path,
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
    options.add_argument("--num-images", type=int, default=50_000, help="Images of a pipeline (default: 50000).")
    options.add_argument(
        "--labels", default="balanced", choices=LABELS, help="All classes in turn, or drawn independently."
    )
    options.add_argument("--seed", type=int, default=0, help="Of the noise, of random labels, and of metrics.")
    options.add_argument("--sampler", default="sde", choices=("sde", "ode"), help="Sampler (default: sde).")
    options.add_argument("--num-inference-steps", type=int, default=250, help="Steps (default: 250).")
    options.add_argument("--guidance-scale", type=float, default=1.0, help="Classifier-free guidance; 1 is none.")
    options.add_argument("--guidance-channels", type=int, help="Guide the first channels only: 3 is SiT's own.")
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
    options.add_argument(
        "--output", help="Report in JSON (default: evaluation.json, or comparison.json with --compare)."
    )
    options.add_argument("--markdown", metavar="FILE", help="Also write the table in Markdown.")
    options.add_argument("--save-npz", metavar="FILE", help="Also write a pipeline's images and labels as ADM does.")
    options.add_argument(
        "--update-card", metavar="FOLDER", help="Also write the results into the model card in this folder."
    )
    options.add_argument(
        "--work-dir",
        help="Where generated images and features are kept, shared by all processes. By default OUTPUT.work; "
        "what was written there is then removed at the end.",
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


def is_report(given: str) -> bool:
    return given.endswith(".json")


def given_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """The names of the options that a command line has, be they at their defaults or not."""
    unset = object()
    names = vars(parser.parse_args(argv))
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(parsed).items() if value is not unset}


def as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def refuse_idle_options(arguments: argparse.Namespace, given: set[str]) -> None:
    """Raises `ValueError` where an option that was `given` would be without effect."""
    if arguments.compare and given & {"save_npz", "update_card"}:
        raise ValueError("--save-npz and --update-card are for one --model: leave them out of --compare.")
    sources = [arguments.model]
    if arguments.compare:
        sources = [source for source in arguments.compare if not is_report(source)]
    if not sources:
        if idle := sorted(given - {"compare", "output", "markdown"}):
            raise ValueError(
                f"{as_options(idle)}: of an evaluation, but {' and '.join(arguments.compare)} are reports of it: "
                "leave it out."
            )
        return
    pipelines = [source for source in sources if is_pipeline(source)]
    generation = argparse.ArgumentParser()
    add_generation_options(generation)
    of_pipelines = {*vars(generation.parse_args([])), "save_npz"} - {"seed"}  # which is of metrics as well
    if not pipelines and (idle := sorted(given & of_pipelines)):
        raise ValueError(
            f"{as_options(idle)}: of a pipeline's images, but {' and '.join(sources)} holds images: leave it out."
        )
    unused = {"sde": {"solver"}, "ode": {"noise_schedule", "noise_level", "last_step_size"}}[arguments.sampler]
    if idle := sorted(given & unused):
        other = "ode" if arguments.sampler == "sde" else "sde"
        raise ValueError(
            f"{as_options(idle)}: of --sampler {other}, but the sampler is {arguments.sampler}: leave it out, or add "
            f"--sampler {other}."
        )
    if arguments.guidance_channels is not None and arguments.guidance_scale == 1.0:
        raise ValueError("--guidance-channels is of --guidance-scale, which is 1.0: leave it out, or give that.")
    if arguments.model_revision and all(Path(pipeline).is_dir() for pipeline in pipelines):
        raise ValueError(f"--model-revision is of the Hub, but {' and '.join(pipelines)} is a folder: leave it out.")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` where a file that is written is a folder, or one of the reports that are read."""
    for option in ("output", "markdown", "save_npz"):
        check_file_path(as_options([option]), getattr(arguments, option))
    read = {Path(given).resolve() for given in arguments.compare or () if is_report(given)}
    for option in ("output", "markdown"):
        written = getattr(arguments, option)
        if written is not None and Path(written).resolve() in read:
            raise ValueError(f"--{option} {written} is one of the reports that are compared: name another file.")


def plan_of(arguments: argparse.Namespace) -> GenerationPlan:
    return GenerationPlan(
        arguments.num_images, schedule_of(arguments), arguments.labels, arguments.seed, arguments.batch_size
    )


def generate(arguments: argparse.Namespace, model: str, plan: GenerationPlan, folder: Path) -> ShardedImages:
    """The images of a pipeline."""
    state = PartialState()
    pipeline = load_pipeline(model, revision=arguments.model_revision, dtype=getattr(torch, arguments.dtype))
    guidance = {"guidance_scale": arguments.guidance_scale}
    if arguments.guidance_channels is not None:
        guidance["guidance_channels"] = arguments.guidance_channels
    policy = as_policy(pipeline, **guidance)
    chosen = {**guidance, "dtype": arguments.dtype}
    policy.model.to(state.device)
    policy.to(state.device)
    images = generate_shards(policy, plan, folder, description=chosen)
    if arguments.save_npz and state.is_main_process:
        save_shards_as_npz(images, arguments.save_npz, plan.conditions(policy.num_conditions))
    return images


def feature_spaces(arguments: argparse.Namespace, num_images: int | None) -> list[FeatureSpace]:
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
        space.check(num_images, arguments.spread)
        spaces.append(space)
    idle = [name for name, value in dataset_options(arguments).items() if value is not None]
    if idle and not any(space.collects_real for space in spaces):
        raise ValueError(
            f"{as_options(idle)}: of a dataset, but {', '.join(reals)} has the statistics that are needed: "
            "leave it out."
        )
    return spaces


def evaluate(
    arguments: argparse.Namespace, model: str, work_dir: Path, leftovers: dict[Path, Callable[[], None]]
) -> dict[str, Any]:
    """The report of one model, in the main process; all call it. `leftovers` takes what removes each work folder."""
    images: ImageSource
    if is_pipeline(model):
        plan = plan_of(arguments)
        spaces = feature_spaces(arguments, plan.num_images)
        images = generate(arguments, model, plan, work_dir / "images")
        leftovers[work_dir / "images"] = partial(remove_shards, images)
        gc.collect()  # the pipeline's memory, before extractors take theirs
        torch.cuda.empty_cache()
    else:
        images = open_images(model)
        spaces = feature_spaces(arguments, getattr(images, "__len__", lambda: None)())
    options = {
        "batch_size": arguments.batch_size,
        "resize": arguments.resize,
        "skip_corrupt": arguments.skip_corrupt,
        "num_workers": arguments.num_workers,
    }
    collected: list[CollectedFeatures] = []
    results = [
        space.measure(images, work_dir, seed=arguments.seed, spread=arguments.spread, collected=collected, **options)
        for space in spaces
    ]
    leftovers |= {work.folder: work.remove for work in collected}
    if not PartialState().is_main_process:
        return {}
    return {
        "model": model,
        "images": min(result["images"] for result in results if result),
        "image_resize": arguments.resize,
        "skip_corrupt": arguments.skip_corrupt,
        "settings": getattr(images, "settings", {}),
        "results": results,
        "library": f"trl-distreward {__version__}, torch {torch.__version__}, python {platform.python_version()}",
    }


def compare(
    arguments: argparse.Namespace, work_dir: Path, leftovers: dict[Path, Callable[[], None]]
) -> dict[str, Any]:
    """Both reports and what changed, in the main process; all call it."""
    read = {given: reports.read_report(given) for given in arguments.compare if is_report(given)}
    generates = any(is_pipeline(given) for given in arguments.compare if given not in read)
    for name, report in read.items():  # before anything is generated
        if generates and report["images"] != arguments.num_images:
            raise ValueError(
                f"{name} is of {report['images']} images, and --num-images is {arguments.num_images}: distances "
                "compare at equal numbers only."
            )
    before, after = (
        read[given] if given in read else evaluate(arguments, given, work_dir / name, leftovers)
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


def remove_work(work_dir: Path, leftovers: dict[Path, Callable[[], None]]) -> None:
    """Removes what this run wrote for itself, and folders that are then empty."""
    for remove in leftovers.values():
        remove()
    for folder in (work_dir / "before", work_dir / "after", work_dir):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    refuse_idle_options(arguments, given_options(parser, argv))
    if arguments.update_card:
        reports.check_card_folder(arguments.update_card)
    if arguments.output is None:
        arguments.output = "comparison.json" if arguments.compare else "evaluation.json"
    check_outputs(arguments)
    state = start_processes()
    work_dir = Path(arguments.work_dir or f"{arguments.output}.work")
    leftovers: dict[Path, Callable[[], None]] = {}
    if arguments.compare:
        report = compare(arguments, work_dir, leftovers)
    else:
        report = evaluate(arguments, arguments.model, work_dir, leftovers)
    if state.is_main_process:
        write_json(arguments.output, report)
        if not arguments.compare:
            present(arguments, report)
        if arguments.work_dir is None:
            remove_work(work_dir, leftovers)
    state.wait_for_everyone()


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.evaluate", main)
