# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Compute the statistics of a set of images in the features of a network, which rewards and metrics compare with.

    trl-distreward statistics images/ --output real.safetensors
    trl-distreward statistics imagenet.npz --output real.safetensors --feature-extractor dinov2
    trl-distreward statistics ILSVRC/imagenet-1k --split train --streaming --resize 256 --output real.safetensors
    trl-distreward statistics webdataset --data-files 'shards/*.tar' --streaming --output real.safetensors
    trl-distreward statistics captions/ --prompt-encoder openai/clip-vit-large-patch14 --output joint.safetensors
    torchrun --standalone --nproc_per_node 8 -m trl_distreward.scripts.statistics images/ --output real.safetensors

Killed at any time, the same command continues. The result is the same to the last bit for any number of processes.
"""

import argparse
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.features import collect_features
from ..evaluation.measure import NamedExtractor
from ..evaluation.sources import open_images
from ..metrics.extractors import describe_extractor
from . import cli
from .common import EXTRACTOR_HELP, Options, add_image_options, find_extractor, image_options, start_processes


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("statistics", __doc__)
    add = parser.add_argument
    add("source", help="folder of images, ADM sample (.npz), or name or folder of a dataset")
    add("--output", required=True, help=".safetensors file to write")
    add("--feature-extractor", metavar="NAME", help=f"{EXTRACTOR_HELP} (default: inception)")
    add("--features", action="store_true", help="keep the features too, which kernel distances need")
    joined = "CLIP model whose embeddings of prompts join the features of images: its own without --feature-extractor"
    add("--prompt-encoder", metavar="CLIP", help=joined)
    add("--prompt-scale", type=float, default=1.0, help="factor of these embeddings (default: 1)")
    add("--prompt-column", default="prompt", help="column of prompts (default: prompt)")
    add_image_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    extractor = find_extractor(arguments.feature_extractor, arguments.prompt_encoder, arguments.prompt_scale)
    images, options = image_options(arguments)
    images["prompt_column"] = arguments.prompt_column if arguments.prompt_encoder else None
    options |= {"work_dir": arguments.work_dir, "features": arguments.features}
    write_statistics(arguments.source, extractor, arguments.output, images=images, **options)


def write_statistics(
    source: str,
    extractor: NamedExtractor,
    output: str | os.PathLike,
    *,
    images: Options,
    features: bool = False,
    work_dir: str | None = None,
    **options: Any,
) -> None:
    """
    Writes the statistics of images, opened with the options `images`, and their features if asked for. All processes
    call it; `options` are those of [`~evaluation.collect_features`].
    """
    state, folder = start_processes(), Path(work_dir or f"{output}.work")
    opened = open_images(source, **images)
    collected = collect_features(opened, {extractor.name: extractor}, folder, **options)
    if state.is_main_process:
        about = {**describe_extractor(extractor), **opened.description, "image_resize": options.get("resize")}
        about["prompt_column"] = images.get("prompt_column")
        about["library"] = f"trl-distreward {__version__}, torch {version('torch')}, pillow {version('pillow')}"
        metadata = {name: str(value) for name, value in about.items() if value is not None}
        statistics = collected.statistics(extractor.name, metadata)
        statistics.save(output, collected.features(extractor.name) if features else None)
        for message in collected.skipped:
            print(f"Skipped: {message}")
        print(f"{output}: {statistics.dimension} features of {statistics.count} images with {extractor.name}")
        if work_dir is None:
            shutil.rmtree(folder)
    state.wait_for_everyone()


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.statistics", main)
