# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What sit_imagenet.py and dit_imagenet.py share, and what takes the place of real data in their smoke tests."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from trl_distreward import DiffusionDistributionConfig, as_policy
from trl_distreward.conditions import balanced_labels
from trl_distreward.generation import SamplingSchedule, generate_images
from trl_distreward.scripts import train

NUM_GENERATED = 32  # images that stand in for real ones in the smoke tests


@dataclass
class ImageNetArguments(train.TrainArguments):
    real_resize: int | None = field(
        default=256, metadata={"help": "Crop the centre of real images and resize it to so many pixels a side."}
    )


def run(arguments: ImageNetArguments, config: DiffusionDistributionConfig, pipeline: DiffusionPipeline) -> None:
    """As `trl-distreward train`; `real_images="generated"` are the untrained pipeline's own."""
    if arguments.real_images == "generated":
        arguments.real_images = generated_images(pipeline, Path(config.output_dir) / "generated")
    train.run(arguments, config, pipeline)


def generated_images(pipeline: DiffusionPipeline, folder: Path) -> str:
    """A folder of images of the pipeline, made once."""
    state = PartialState()
    if state.is_main_process and not folder.is_dir():
        unfinished = folder.with_name(f"_{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        policy: Any = as_policy(pipeline)
        labels = balanced_labels(NUM_GENERATED, policy.num_conditions)
        batches = generate_images(policy, labels, SamplingSchedule(4, "ode"), seed=1, stream="real")
        for number, image in enumerate(torch.cat([images for images, _ in batches])):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(unfinished / f"{number:03d}.png")
        os.replace(unfinished, folder)
    state.wait_for_everyone()
    return str(folder)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Features for the smoke tests, which must not need a network: colours of a 4x4 image."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)  # (B, 48)


def random_vae(image_size: int) -> AutoencoderKL:
    """A small decoder of latents `(4, size / 8, size / 8)`, as Stable Diffusion's is."""
    torch.manual_seed(1)
    levels = 4
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=image_size,
    )
