# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What several commands need: feature extractors by name, processes, and shared options."""

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import TrlParser

from ..metrics.clip import JointTextFeatures, load_clip
from ..metrics.extractors import load_feature_extractor

_EXTRACTOR_OPTIONS = ("source", "resize", "output", "pooling", "size", "mean", "std", "mode", "revision")
EXTRACTOR_HELP = (
    "inception, dinov2, clip, a Hub id or a folder of a vision backbone, or the dotted path of a callable; with "
    "options after commas, e.g. inception,source=weights.pth,resize=pytorch or inception,output=spatial or "
    "./backbone,pooling=mean,size=256,mean=0.5:0.5:0.5,std=0.5:0.5:0.5"
)
_DATASET_OPTIONS = ("split", "config", "revision", "data_files", "streaming", "image_column")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every option with its default."""


def make_trl_parser(dataclasses: Sequence[type], description: str | None, prog: str | None = None) -> TrlParser:
    """A parser whose options are the fields of dataclasses, on the command line and in a YAML file."""
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"  # there are some two hundred
    return TrlParser(
        dataclasses,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def find_extractor(spec: str) -> Any:
    """
    The feature extractor that `NAME[,option=value…]` names, in CPU memory; options are those of
    [`~metrics.extractors.load_feature_extractor`].
    """
    name, options = split_spec(spec)
    unknown = [key for key in options if key not in _EXTRACTOR_OPTIONS]
    if unknown:
        raise ValueError(f"{spec!r} has options {unknown}: a feature extractor has {', '.join(_EXTRACTOR_OPTIONS)}.")
    for key in {"size", "mean", "std"} & options.keys():
        options[key] = _numbers(key, options[key])
    extractor = load_feature_extractor(name, **options)
    if getattr(extractor, "needs_conditions", False):
        raise ValueError(
            f"{name} needs the images' conditions, but a set of images has none: name one of images alone."
        )
    return extractor


def check_file_path(option: str, path: str | None) -> None:
    """Raises `ValueError` where what is to be written is a folder, which would be noticed when all work is done."""
    if path is not None and (path.endswith("/") or Path(path).is_dir()):
        raise ValueError(f"{option} {path} is a folder: name a file.")


def split_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`NAME[,option=value…]` as a name and its options."""
    name, *pairs = spec.split(",")
    return name, dict(pair.partition("=")[::2] for pair in pairs)


def beside_prompts(feature_extractor: Any, prompt_encoder: str, prompt_scale: float) -> JointTextFeatures:
    """
    Features of images beside the embeddings of their prompts by a CLIP model, whose own embeddings of images they are
    where `feature_extractor` is `None`.
    """
    clip = load_clip(prompt_encoder)
    return JointTextFeatures(clip if feature_extractor is None else feature_extractor, clip.prompts, prompt_scale)


def _numbers(option: str, text: str) -> int | tuple[float, ...]:
    """A size, or a value for each colour."""
    try:
        return int(text) if option == "size" else tuple(map(float, text.split(":")))
    except ValueError as error:
        raise ValueError(f"{option}={text!r} must be made of numbers, as size=224 and mean=0.5:0.5:0.5.") from error


def start_processes() -> PartialState:
    """This process among those that a launcher started; they wait for one another as long as it takes."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def checkpoint_to_resume(config: Any) -> str | bool | None:
    """What the command line or a file has for `resume_from_checkpoint`: a folder, or yes or no in words."""
    given = config.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)


def finish(trainer: Any) -> None:
    """At the end of a command, for all processes."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def finish_interrupted(trainer: Any) -> None:
    """At the end of a command that SIGTERM has ended: says how to go on."""
    if trainer.accelerator.is_main_process:
        print(
            f"Stopped by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, with a "
            f"checkpoint in {trainer.args.output_dir}. To go on, give the same command with "
            "--resume_from_checkpoint true."
        )
    finish(trainer)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument(
        "--resize",
        type=int,
        metavar="N",
        help="Crop the centre of each image and resize it to N x N as ImageNet is prepared; without it images must be "
        "of one size.",
    )
    images.add_argument(
        "--skip-corrupt", action="store_true", help="Leave out images that cannot be read, and say how many."
    )
    images.add_argument("--num-workers", type=int, default=4, help="Threads that decode images, in each process.")


def add_dataset_options(parser: argparse.ArgumentParser, of: str) -> None:
    dataset = parser.add_argument_group(f"where {of} is a dataset")
    dataset.add_argument("--split", help="Split; needed where there are several.")
    dataset.add_argument("--config", help="Configuration of the dataset.")
    dataset.add_argument("--revision", help="Branch, tag or commit; recorded as a commit.")
    dataset.add_argument(
        "--data-files", nargs="+", help=f"Files, where {of} is a format such as webdataset or parquet."
    )
    dataset.add_argument(
        "--streaming", action="store_true", default=None, help="Read it without downloading it first."
    )
    dataset.add_argument("--image-column", help="Column of the images; by default the only one.")


def dataset_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in _DATASET_OPTIONS}
