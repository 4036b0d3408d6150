# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Computes the statistics of a set of images in the features of a network: what rewards and metrics compare with.

    trl-distreward statistics images/ --output real.safetensors
    trl-distreward statistics imagenet.npz --output real.safetensors --feature-extractor dinov2
    trl-distreward statistics ILSVRC/imagenet-1k --split train --streaming --resize 256 --output real.safetensors
    trl-distreward statistics webdataset --data-files 'shards/*.tar' --streaming --output real.safetensors
    trl-distreward statistics captions/ --prompt-encoder openai/clip-vit-large-patch14 --output joint.safetensors
    torchrun --standalone --nproc_per_node 8 -m trl_distreward.scripts.statistics images/ --output real.safetensors

Killed at any moment, the same command goes on where it was. The file is the same to the last bit with any number of
processes, and however often it was interrupted.
"""

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.collect import collect_features
from ..evaluation.sources import open_images
from ..evaluation.statistics import describe, write_statistics
from . import cli
from .common import (
    EXTRACTOR_HELP,
    add_dataset_options,
    add_image_options,
    beside_prompts,
    check_file_path,
    dataset_options,
    find_extractor,
    start_processes,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-distreward statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", help="Folder of images, with subfolders; an ADM sample (.npz); or a dataset, by name or as a folder."
    )
    parser.add_argument("--output", required=True, help="The .safetensors file to write.")
    parser.add_argument(
        "--feature-extractor",
        metavar="NAME",
        help=f"{EXTRACTOR_HELP} (default: inception; with --prompt-encoder, that model).",
    )
    parser.add_argument(
        "--features",
        action="store_true",
        help="Also keep the features themselves, which kernel distances, precision and recall need.",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="Images at a time (default: 64).")
    parser.add_argument(
        "--work-dir",
        help="Where unfinished work is kept: 4 bytes for each feature of each image, 8 KiB for an image with "
        "inception; shared by all processes. By default OUTPUT.work. What it wrote there it removes at the end.",
    )
    add_image_options(parser)
    add_dataset_options(parser, "SOURCE")
    prompts = parser.add_argument_group("where SOURCE is a dataset of images with prompts")
    prompts.add_argument(
        "--prompt-encoder",
        metavar="CLIP",
        help="Hub id or folder of a CLIP model whose embeddings of the prompts are put beside the features of the "
        "images: what rewards with the same prompt_encoder compare with.",
    )
    prompts.add_argument("--prompt-scale", type=float, default=1.0, help="Factor of the embeddings (default: 1).")
    prompts.add_argument("--prompt-column", help="Column of the prompts (default: prompt).")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    check_file_path("the output", arguments.output)
    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output={arguments.output!r} must end in .safetensors.")
    if arguments.prompt_encoder is None and (arguments.prompt_column or arguments.prompt_scale != 1.0):
        raise ValueError("--prompt-column and --prompt-scale say how --prompt-encoder is used, which is missing.")
    state = start_processes()
    prompt_column = arguments.prompt_column or ("prompt" if arguments.prompt_encoder else None)
    source = open_images(arguments.source, **dataset_options(arguments), prompt_column=prompt_column)
    extractor = find_features(arguments)
    work_dir = Path(arguments.work_dir or f"{output}.work")
    collected = collect_features(
        source,
        extractor,
        work_dir,
        name=extractor.name,
        description={"resize": extractor.resize},
        batch_size=arguments.batch_size,
        resize=arguments.resize,
        skip_corrupt=arguments.skip_corrupt,
        num_workers=arguments.num_workers,
    )
    if state.is_main_process:
        kept = ("source", "config", "split", "revision", "prompt_column")
        about = {"source": arguments.source} | {k: v for k, v in source.description.items() if k in kept}
        metadata = describe(collected, extractor, image_resize=arguments.resize, **about)
        statistics = write_statistics(collected, output, metadata, arguments.features)
        for message in collected.skipped:
            print(f"Skipped: {message}")
        modes = ", ".join(f"{count} {mode}" for mode, count in collected.modes.items())
        print(
            f"{output}: {statistics.count} images ({modes}), {len(collected.skipped)} skipped, "
            f"{statistics.dimension} features of {extractor.name}."
        )
        collected.remove()
    state.wait_for_everyone()


def find_features(arguments: argparse.Namespace) -> Any:
    """The extractor that the options name, beside the embeddings of prompts where they are asked for."""
    name, encoder = arguments.feature_extractor, arguments.prompt_encoder
    if encoder is None:
        return find_extractor(name or "inception")
    return beside_prompts(None if name is None else find_extractor(name), encoder, arguments.prompt_scale)


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.statistics", main)
