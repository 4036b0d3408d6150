# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes an adapter of Stable Diffusion 3.5 medium by how close its images, with their prompts, come to real images
with theirs, and by a preference model.

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/sd3_lora.py \\
        --config examples/configs/sd3_medium_lora.yaml --dataset_name DATASET \\
        --real_images DATASET --real_resize 512

DATASET, an id on the Hub or a folder that `datasets` saved, has a column of prompts (--prompt_column caption if it has
another name) and one of real images beside them. Prompts and real images may be of different datasets, or the real
side a file that `trl-distreward statistics --prompt-encoder` wrote (--real_statistics). The prompts are to be of the
kind that the real images' captions are: the distance is between images beside their prompts.

What it would take on this machine, before it starts:     … --dry-run
Another text-to-image pipeline:                           … --model FOLDER_OR_ID
A smoke test on a CPU:                                    --config examples/configs/sd3_smoke.yaml

The adapter ends in OUTPUT_DIR/adapter, where `pipeline.load_lora_weights` finds it, and the pipeline with the adapter
merged in OUTPUT_DIR. Options are those of `trl-distreward train`, and this:
"""

from dataclasses import dataclass, field
from pathlib import Path

from tiny_sd3 import make_parts

from trl_distreward import DiffusionDistributionConfig
from trl_distreward.scripts import cli, train
from trl_distreward.scripts.common import make_trl_parser


@dataclass
class SD3Arguments(train.TrainArguments):
    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={
            "help": "Folder or Hub id of the pipeline; or random, as may be dataset_name, real_images, prompt_encoder "
            "and the source of a reward: then they are small and made in OUTPUT_DIR/random."
        },
    )


def use_random_parts(arguments: SD3Arguments, folder: Path) -> None:
    """Puts the paths of small random parts in the place of `random`."""
    parts = {"model": "pipeline", "dataset_name": "dataset", "real_images": "dataset", "prompt_encoder": "clip"}
    wanted = [name for name in parts if getattr(arguments, name) == "random"]
    if wanted:
        make_parts(folder)
    for name in wanted:
        setattr(arguments, name, str(folder / parts[name]))
    arguments.reward_funcs = [
        spec.replace("source=random", f"source={folder / 'clip'}") for spec in arguments.reward_funcs
    ]


def main(argv: list[str] | None = None) -> None:
    parser = make_trl_parser((SD3Arguments, DiffusionDistributionConfig), __doc__)
    arguments, config = parser.parse_args_and_config(argv)
    use_random_parts(arguments, Path(config.output_dir) / "random")
    train.run(arguments, config, arguments.model)


if __name__ == "__main__":
    cli.run("sd3_lora.py", main)
