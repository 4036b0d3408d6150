# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes a pipeline on distribution-wise rewards.

    trl-distreward train --config recipe.yaml
    accelerate launch --multi_gpu -m trl_distreward.scripts.train --config recipe.yaml --learning_rate 2e-5
    trl-distreward train --config recipe.yaml --dry-run
    trl-distreward train --model stabilityai/stable-diffusion-3.5-medium --use_peft --output_dir OUTPUT \\
        --dataset_name DATASET --real_images DATASET --real_resize 512 \\
        --prompt_encoder openai/clip-vit-large-patch14 --reward_funcs pick_score --reward_weights 1.0 0.5 ...

--dry-run measures one micro-batch and prints what the run would take: memory, seconds, device-hours, disk. A run that
cannot fit is refused.

Every field of DiffusionDistributionConfig and of TrainingArguments is an option, on the command line or in the YAML
file; the command line wins.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl import TrlParser

from ..policies import DiffusionPolicy, as_policy, load_pipeline
from ..rewards.subset_replace import CREDITS
from ..trainer.callbacks import LogSamplesCallback
from ..trainer.distribution_reward_config import DiffusionDistributionConfig
from ..trainer.distribution_reward_trainer import DistributionRewardTrainer
from ..trainer.dry_run import check_resources, dry_run, format_prediction
from . import cli
from .arguments import RewardArguments, build_metrics, build_rewards, load_conditions, shown_sampler
from .common import checkpoint_to_resume, finish, finish_interrupted, make_trl_parser


@dataclass
class TrainArguments(RewardArguments):
    """What is trained, on what reward, and what is watched."""

    idle_without: ClassVar[dict[tuple[str, ...], tuple[str, ...]]] = {
        **RewardArguments.idle_without,
        ("feature_extractor", "prompt_encoder"): ("distance", "credit", "control_variate"),
        ("use_peft",): ("lora_r", "lora_alpha", "lora_target_modules"),
    }

    credit: str = field(
        default="shared", metadata={"help": "Whether a subset's images share its reward.", "choices": list(CREDITS)}
    )
    control_variate: bool = field(
        default=False, metadata={"help": "Take out of shared rewards what the removed images' absence does."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter in place of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that are adapted; attention and MLP by default."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the pipeline's weights as they are loaded; those that are trained are float32 all the same.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    height: int | None = field(
        default=None, metadata={"help": "Of a text-to-image model's images; what it was made for by default."}
    )
    width: int | None = field(default=None, metadata={"help": "Likewise."})
    offload_text_encoders: bool = field(
        default=False, metadata={"help": "Keep text encoders in CPU memory but while they encode."}
    )
    cache_size: int | None = field(
        default=None, metadata={"help": "Prompts whose embeddings are kept in CPU memory; 10000 by default."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what the run would take, measured on one micro-batch, and stop."}
    )


def make_parser() -> TrlParser:
    return make_trl_parser((TrainArguments, DiffusionDistributionConfig), __doc__, "trl-distreward train")


def main(argv: list[str] | None = None) -> None:
    arguments, config = make_parser().parse_args_and_config(argv)
    run(arguments, config, arguments.model)


def run(arguments: TrainArguments, config: DiffusionDistributionConfig, model: Any) -> None:
    """Trains `model` as the options say, or predicts what that takes."""
    logging.getLogger("trl_distreward").setLevel(logging.INFO)
    logging.getLogger("trl_distreward").addHandler(logging.StreamHandler())
    if arguments.dry_run:  # nothing is to be reported or pushed
        config.report_to, config.push_to_hub, config.disable_tqdm = [], False, True
    trainer = build_trainer(arguments, config, model)
    if arguments.dry_run:
        prediction = dry_run(trainer)
        if trainer.is_world_process_zero():
            print(format_prediction(prediction))
        finish(trainer)
        if not prediction.fits:
            sys.exit(1)
        return
    check_resources(trainer)
    if arguments.log_samples:
        trainer.add_callback(LogSamplesCallback(trainer, sampler=shown_sampler(config)))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config))
    if trainer.interrupted:
        finish_interrupted(trainer)
        return
    if config.push_to_hub:
        trainer.push_to_hub()  # which saves, with the model card
    else:
        trainer.save_model()
    finish(trainer)


def build_trainer(
    arguments: TrainArguments, config: DiffusionDistributionConfig, model: Any
) -> DistributionRewardTrainer:
    peft_config = None
    if (
        isinstance(model, str)
        and os.path.isdir(model)
        and os.path.realpath(model) == os.path.realpath(config.output_dir)
    ):
        raise ValueError(f"output_dir={config.output_dir!r} is the model's own folder: name another one to write to.")
    policy = load_policy(arguments, config, model)
    dataset = load_conditions(arguments)
    rewards = build_rewards(
        arguments, config.output_dir, credit=arguments.credit, control_variate=arguments.control_variate
    )
    if arguments.use_peft:
        peft_config = LoraConfig(
            r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=arguments.lora_target_modules
        )
    return DistributionRewardTrainer(
        model=policy,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset,
        eval_metrics=build_metrics(arguments, rewards),
        peft_config=peft_config,
    )


def load_policy(arguments: TrainArguments, config: DiffusionDistributionConfig, model: Any) -> DiffusionPolicy:
    """The policy of a pipeline, or of its folder or Hub id, as the options say."""
    if isinstance(model, str):
        model = load_pipeline(model, dtype=getattr(torch, arguments.dtype))
    elif isinstance(model, DiffusionPipeline) and arguments.dtype != "float32":
        model.to(getattr(torch, arguments.dtype))
    names = ("height", "width", "offload_text_encoders", "cache_size")
    given = {name: getattr(arguments, name) for name in names}
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    if config.guidance_channels is not None:
        options["guidance_channels"] = config.guidance_channels
    return as_policy(model, config.guidance_scale, **options)


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.train", main)
