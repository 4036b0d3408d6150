# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes SiT on ImageNet 256x256 by how close its images come to real ones: the paper's headline run.

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/sit_imagenet.py \\
        --config examples/configs/sit_xl_imagenet256.yaml \\
        --model SiT-XL-2-256x256.pt --real_statistics VIRTUAL_imagenet256_labeled.npz

What it would take on this machine, before it starts:     … --dry-run
Rejection sampling, LoRA, a smoke test on a CPU:          --config examples/configs/sit_xl_imagenet256_rs.yaml, …

Real data is one of: ADM's reference batch or another statistics file (--real_statistics), or images whose statistics
are computed first (--real_images): a folder, an .npz, or a dataset, e.g. ILSVRC/imagenet-1k, which is streamed.
Options are those of `trl-distreward train`, and these:
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from trl import TrlParser

from trl_distreward import (
    ClassConditionalPolicy,
    DiffusionDistributionConfig,
    FeatureStatistics,
    SiTPipeline,
    SiTTransformer2DModel,
    load_pipeline,
)
from trl_distreward.generation import SamplingSchedule, balanced_labels, generate_images
from trl_distreward.metrics.features import load_feature_extractor
from trl_distreward.scripts import train

NUM_GENERATED = 32  # images that stand in for real ones in the smoke test


@dataclass
class SiTImageNetArguments(train.TrainArguments):
    model: str = field(
        default="SiT-XL-2-256x256.pt",
        metadata={"help": "The original checkpoint (.pt), the folder or Hub id of a pipeline, or random:SIZE."},
    )
    vae: str = field(
        default="stabilityai/sd-vae-ft-ema",
        metadata={"help": "Decoder of an original checkpoint: folder or Hub id, or random."},
    )
    real_images: str | None = field(
        default=None,
        metadata={"help": "Images to compute real_statistics from: a folder, .npz or dataset; or generated."},
    )
    real_split: str = field(default="train", metadata={"help": "Split of that dataset."})


def load_sit(name: str, vae: str) -> SiTPipeline:
    if name.startswith("random:"):
        torch.manual_seed(0)
        transformer = SiTTransformer2DModel.from_size(name.removeprefix("random:"))
        torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.02)  # else the velocity is zero
    elif name.endswith((".pt", ".pth")):
        from trl_distreward.conversion import load_original_sit

        transformer = load_original_sit(name)
    else:
        return load_pipeline(name)
    return SiTPipeline(transformer, random_vae() if vae == "random" else AutoencoderKL.from_pretrained(vae))


def random_vae() -> AutoencoderKL:
    """A small decoder of the real one's shapes: latents 4x32x32, images 3x256x256."""
    torch.manual_seed(1)
    levels = 4
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=256,
    )


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Features for the smoke test, which must not need a network: colours of a 4x4 image."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)  # (B, 48)


def real_statistics(
    arguments: SiTImageNetArguments, config: DiffusionDistributionConfig, pipeline: SiTPipeline
) -> Any:
    """What the reward compares with: the statistics that were given, or those of the images that were."""
    if arguments.real_images is None:
        return arguments.real_statistics
    if arguments.real_images == "generated":
        extractor = load_feature_extractor(arguments.feature_extractor)
        policy, labels = (
            ClassConditionalPolicy(pipeline),
            balanced_labels(NUM_GENERATED, pipeline.transformer.config.num_classes),
        )
        batches = generate_images(policy, labels, SamplingSchedule(4, "ode"), seed=1, stream="real")
        return FeatureStatistics.from_features(torch.cat([extractor(images) for images, _ in batches]))
    from trl_distreward.scripts import statistics

    path = Path(arguments.real_statistics or Path(config.output_dir) / "real_statistics.safetensors")
    if not path.is_file():
        options = ["--output", str(path), "--feature-extractor", arguments.feature_extractor, "--resize", "256"]
        if not os.path.exists(arguments.real_images):
            options += ["--split", arguments.real_split, "--streaming"]
        statistics.main([arguments.real_images, *options])
    return str(path)


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((SiTImageNetArguments, DiffusionDistributionConfig), description=__doc__)
    arguments, config = parser.parse_args_and_config(argv)
    pipeline = load_sit(arguments.model, arguments.vae)
    arguments.real_statistics = real_statistics(arguments, config, pipeline)
    train.run(arguments, config, pipeline)


if __name__ == "__main__":
    main()
