# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes DiT on ImageNet 256x256 by how close its images come to real ones: the paper's recipe on another model.

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/dit_imagenet.py \\
        --config examples/configs/dit_xl_imagenet256.yaml --real_statistics VIRTUAL_imagenet256_labeled.npz

What it would take on this machine, before it starts:     … --dry-run
A smoke test on a CPU:                                    --config examples/configs/dit_smoke.yaml

Real data is one of: ADM's reference batch or another statistics file (--real_statistics), or images whose statistics
are computed first (--real_images): a folder, an .npz, or a dataset, e.g. ILSVRC/imagenet-1k, which is streamed.
Options are those of `trl-distreward train`, and these:
"""

from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from imagenet import ImageNetArguments, random_vae, run

from trl_distreward import DiffusionDistributionConfig, load_pipeline
from trl_distreward.scripts import cli
from trl_distreward.scripts.common import make_trl_parser


@dataclass
class DiTImageNetArguments(ImageNetArguments):
    model: str = field(
        default="facebook/DiT-XL-2-256", metadata={"help": "The folder or Hub id of a DiTPipeline, or random."}
    )


def load_dit(name: str) -> DiTPipeline:
    if name != "random":
        return load_pipeline(name)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    names = {label: f"class {label}" for label in range(1000)}
    return DiTPipeline(transformer, random_vae(64), DDIMScheduler(clip_sample=False), id2label=names)


def main(argv: list[str] | None = None) -> None:
    parser = make_trl_parser((DiTImageNetArguments, DiffusionDistributionConfig), __doc__)
    arguments, config = parser.parse_args_and_config(argv)
    run(arguments, config, load_dit(arguments.model))


if __name__ == "__main__":
    cli.run("dit_imagenet.py", main)
