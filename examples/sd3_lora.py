# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes an adapter of Stable Diffusion 3.5 medium with two rewards: the distance of images joined with their prompts
from real images joined with theirs, and a preference model.

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/sd3_lora.py \\
        --config examples/configs/sd3_medium_lora.yaml --dataset_name DATASET \\
        --real_images DATASET --real_resize 512

DATASET is an id on the Hub or a folder that `datasets` saved, with a column of prompts (--prompt_column caption if it
has another name) and a column of real images. Prompts and real images may come from different datasets, and real data
from a file of `trl-distreward statistics --prompt-encoder` (--real_statistics). Use prompts that are like the captions
of the real images.

Cost on this machine, before the run: … --dry-run
Another text-to-image pipeline:       … --model FOLDER_OR_ID
Smoke test on a CPU:                  --config examples/configs/sd3_smoke.yaml

The adapter goes to OUTPUT_DIR/adapter, for `pipeline.load_lora_weights`, and the pipeline with the merged adapter to
OUTPUT_DIR. Options are those of `trl-distreward train` and this:
"""

from dataclasses import dataclass
from pathlib import Path

from tiny_sd3 import make_parts

from trl_distreward import DiffusionDistributionConfig
from trl_distreward.scripts import cli, train
from trl_distreward.scripts.arguments import option
from trl_distreward.scripts.common import make_trl_parser


@dataclass
class SD3Arguments(train.TrainArguments):
    model: str = option(
        "stabilityai/stable-diffusion-3.5-medium",
        "Folder or Hub id of the pipeline. For tests `random` makes a small one in OUTPUT_DIR/random; dataset_name, "
        "real_images, prompt_encoder and the source of a reward may be random too.",
    )


def use_random_parts(arguments: SD3Arguments, folder: Path) -> None:
    """Replaces `random` by paths of small random parts."""
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
