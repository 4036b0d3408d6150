# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes SiT or DiT on ImageNet 256x256 with a distribution-wise reward: the paper's main run.

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/sit_imagenet.py \\
        --config examples/configs/sit_xl_imagenet256.yaml \\
        --model SiT-XL-2-256x256.pt --real_statistics VIRTUAL_imagenet256_labeled.npz

Cost on this machine, before the run:           … --dry-run
Rejection sampling, LoRA, DiT, CPU smoke tests: --config examples/configs/sit_xl_imagenet256_rs.yaml, …

Real data is ADM's reference batch or another statistics file (--real_statistics), or images to compute statistics from
(--real_images): a folder, an .npz, or a dataset, e.g. ILSVRC/imagenet-1k. Options are those of `trl-distreward train`
and these:
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from trl_distreward import (
    DiffusionDistributionConfig,
    SamplingSchedule,
    SiTPipeline,
    SiTTransformer2DModel,
    as_policy,
    generate_images,
    load_pipeline,
)
from trl_distreward.conversion import load_original_sit
from trl_distreward.scripts import cli, train
from trl_distreward.scripts.arguments import option
from trl_distreward.scripts.common import make_trl_parser


@dataclass
class ImageNetArguments(train.TrainArguments):
    model: str = option(
        "SiT-XL-2-256x256.pt",
        "Original SiT checkpoint (.pt), folder or Hub id of a pipeline, or for tests random:SIZE or random:dit.",
    )
    vae: str = option("stabilityai/sd-vae-ft-ema", "Decoder of an original checkpoint: folder or Hub id, or random.")
    real_resize: int | None = option(256, "Side to which real images are cropped and resized.")


def load_model(name: str, vae: str) -> DiffusionPipeline:
    """Loads, converts or makes a pipeline."""
    torch.manual_seed(0)
    if name == "random:dit":
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
        )
        torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
        names = {label: f"class {label}" for label in range(1000)}
        return DiTPipeline(transformer, random_vae(64), DDIMScheduler(clip_sample=False), id2label=names)
    if name.startswith("random:"):
        transformer = SiTTransformer2DModel.from_size(name.removeprefix("random:"))
        torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.02)  # else the velocity is zero
    elif name.endswith((".pt", ".pth")):
        transformer = load_original_sit(name)
    else:
        return load_pipeline(name)
    return SiTPipeline(transformer, random_vae(256) if vae == "random" else AutoencoderKL.from_pretrained(vae))


# ---- for smoke tests ----


def random_vae(image_size: int) -> AutoencoderKL:
    """Makes a small decoder of latents `(4, size / 8, size / 8)`, the shape of Stable Diffusion's."""
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


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Colours of a 4x4 image, as features `(B, 48)`."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def write_generated(pipeline: DiffusionPipeline, folder: Path, count: int = 32) -> None:
    """Writes images of the pipeline, once, in place of real ones."""
    state = PartialState()
    if state.is_main_process and not folder.is_dir():
        unfinished = folder.with_name(f"_{folder.name}")
        unfinished.mkdir(parents=True, exist_ok=True)
        batches = generate_images(as_policy(pipeline), torch.arange(count), SamplingSchedule(4, "ode"), seed=1)
        for number, image in enumerate(torch.cat([images for images, _ in batches])):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(unfinished / f"{number:03d}.png")
        os.replace(unfinished, folder)
    state.wait_for_everyone()


def main(argv: list[str] | None = None) -> None:
    parser = make_trl_parser((ImageNetArguments, DiffusionDistributionConfig), __doc__)
    arguments, config = parser.parse_args_and_config(argv)
    pipeline = load_model(arguments.model, arguments.vae)
    if arguments.real_images == "generated":
        arguments.real_images = str(Path(config.output_dir) / "generated")
        write_generated(pipeline, Path(arguments.real_images))
    train.run(arguments, config, pipeline)


if __name__ == "__main__":
    cli.run("sit_imagenet.py", main)
