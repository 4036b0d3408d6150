# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Compute the statistics of a set of images in the features of a network, which rewards and metrics compare with.

    trl-distreward statistics images/ --output real.safetensors
    trl-distreward statistics imagenet.npz --output real.safetensors --feature-extractor dinov2
    trl-distreward statistics ILSVRC/imagenet-1k --split train --streaming --resize 256 --output real.safetensors
    trl-distreward statistics webdataset --data-files 'shards/*.tar' --streaming --output real.safetensors
    trl-distreward statistics captions/ --prompt-encoder openai/clip-vit-large-patch14 --output joint.safetensors
    torchrun --standalone --nproc_per_node 8 -m trl_distreward statistics images/ --output real.safetensors

Killed at any time, the same command continues. The result is the same to the last bit for any number of processes.
"""

import argparse

from ..evaluation.features import start_processes
from ..evaluation.real import write_statistics
from ..evaluation.sources import open_images
from ..metrics.statistics import FeatureStatistics
from . import cli
from .common import EXTRACTOR_HELP, add_image_options, find_extractor, image_options


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
    state = start_processes()
    opened = open_images(arguments.source, **images)
    collected = write_statistics(opened, extractor, arguments.output, **options)
    if state.is_main_process:
        for message in collected.skipped:
            print(f"Skipped: {message}")
        written = FeatureStatistics.load(arguments.output)
        what = f"{written.dimension} features of {written.count} images with {extractor.name}"
        print(f"{arguments.output}: {what}")
