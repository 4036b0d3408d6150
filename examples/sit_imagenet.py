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

from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from imagenet import ImageNetArguments, random_vae, run

from trl_distreward import DiffusionDistributionConfig, SiTPipeline, SiTTransformer2DModel, load_pipeline
from trl_distreward.scripts import cli
from trl_distreward.scripts.common import make_trl_parser


@dataclass
class SiTImageNetArguments(ImageNetArguments):
    model: str = field(
        default="SiT-XL-2-256x256.pt",
        metadata={"help": "The original checkpoint (.pt), the folder or Hub id of a pipeline, or random:SIZE."},
    )
    vae: str = field(
        default="stabilityai/sd-vae-ft-ema",
        metadata={"help": "Decoder of an original checkpoint: folder or Hub id, or random."},
    )


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
    return SiTPipeline(transformer, random_vae(256) if vae == "random" else AutoencoderKL.from_pretrained(vae))


def main(argv: list[str] | None = None) -> None:
    parser = make_trl_parser((SiTImageNetArguments, DiffusionDistributionConfig), __doc__)
    arguments, config = parser.parse_args_and_config(argv)
    run(arguments, config, load_sit(arguments.model, arguments.vae))


if __name__ == "__main__":
    cli.run("sit_imagenet.py", main)
