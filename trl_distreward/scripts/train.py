# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a pipeline with distribution-wise rewards.

    trl-distreward train --config recipe.yaml
    accelerate launch --multi_gpu -m trl_distreward train --config recipe.yaml --learning_rate 2e-5
    trl-distreward train --config recipe.yaml --dry-run
    trl-distreward train --config recipe.yaml --device h200
    trl-distreward train --model stabilityai/stable-diffusion-3.5-medium --use_peft --output_dir OUTPUT \\
        --dataset_name DATASET --real_images DATASET --real_resize 512 \\
        --prompt_encoder openai/clip-vit-large-patch14 --reward_funcs pick_score --reward_weights 1.0 0.5 ...

--dry-run measures the first steps and prints what the run would take: memory, seconds, device-hours, disk. --device
predicts the same for another GPU, without running the network.

Every field of DiffusionDistributionConfig and of TrainingArguments is an option, on the command line or in the YAML
file. The command line overrides the file.
"""

import os
import sys
from dataclasses import dataclass

import torch
from peft import LoraConfig
from trl import TrlParser

from ..policies import DiffusionPolicy, as_policy, load_pipeline
from ..rewards.subset_replace import CREDITS
from ..trainer.costs import GPUS
from ..trainer.diffusion_distribution_config import DiffusionDistributionConfig
from ..trainer.distribution_reward_trainer import DistributionRewardTrainer
from ..trainer.dry_run import check_disk, dry_run, predict
from .arguments import Model, RewardArguments, build_metrics, build_rewards, load_conditions, option, run_trainer
from .common import make_trl_parser


@dataclass
class TrainArguments(RewardArguments):
    """Options of training that the configuration does not have."""

    credit: str = option("shared", "How the images of a subset share its reward.", choices=list(CREDITS))
    control_variate: bool = option(False, "Subtract the effect of removing images from shared rewards.")
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Scale of the adapter.")
    lora_target_modules: list[str] | None = option(None, "Modules to adapt; attention and MLP by default.")
    dtype: str = option("float32", "Dtype of frozen weights.", choices=["float32", "bfloat16", "float16"])
    height: int | None = option(None, "Height of the images of a text-to-image model.")
    width: int | None = option(None, "Width of the images of a text-to-image model.")
    offload_text_encoders: bool | None = option(None, "Keep text encoders in CPU memory while they do not encode.")
    dry_run: bool = option(False, "Measure and print what the run would take, and stop.")
    device: str | None = option(None, "Predict and print what the run would take on this GPU, and stop.", list(GPUS))


def make_parser() -> TrlParser:
    return make_trl_parser((TrainArguments, DiffusionDistributionConfig), __doc__, "trl-distreward train")


def main(argv: list[str] | None = None) -> None:
    arguments, config = make_parser().parse_args_and_config(argv)
    run(arguments, config, arguments.model)


def run(arguments: TrainArguments, config: DiffusionDistributionConfig, model: Model) -> None:
    """Trains a pipeline, given as itself, its folder or its Hub id; or predicts what that would take."""
    stops = arguments.dry_run or arguments.device
    if stops:  # reports and pushes nothing
        config.report_to, config.push_to_hub, config.disable_tqdm = [], False, True
    trainer = build_trainer(arguments, config, model)
    if stops:
        prediction = predict(trainer, arguments.device) if arguments.device else dry_run(trainer)
        if trainer.is_world_process_zero():
            print(prediction)
        trainer.accelerator.end_training()
        if not prediction.fits:
            sys.exit(1)
        return
    check_disk(trainer)
    run_trainer(trainer)


def build_trainer(
    arguments: TrainArguments, config: DiffusionDistributionConfig, model: Model
) -> DistributionRewardTrainer:
    if isinstance(model, str) and os.path.realpath(model) == os.path.realpath(config.output_dir):
        raise ValueError(f"output_dir={config.output_dir!r} is the folder of the model: name another one.")
    rewards = build_rewards(arguments, credit=arguments.credit, control_variate=arguments.control_variate)
    lora = {"lora_alpha": arguments.lora_alpha, "target_modules": arguments.lora_target_modules}
    return DistributionRewardTrainer(
        model=load_policy(arguments, config, model),
        reward_funcs=rewards,
        args=config,
        train_dataset=load_conditions(arguments),
        eval_metrics=build_metrics(arguments, rewards),
        peft_config=LoraConfig(r=arguments.lora_r, **lora) if arguments.use_peft else None,
    )


def load_policy(arguments: TrainArguments, config: DiffusionDistributionConfig, model: Model) -> DiffusionPolicy:
    """Returns the policy of a pipeline, or of its folder or Hub id."""
    dtype = getattr(torch, arguments.dtype)
    if isinstance(model, str):
        model = load_pipeline(model, dtype=dtype)
    elif dtype != torch.float32:
        model.to(dtype)
    options = {name: getattr(arguments, name) for name in ("height", "width", "offload_text_encoders")}
    options["guidance_channels"] = config.guidance_channels
    return as_policy(model, config.guidance_scale, **{k: v for k, v in options.items() if v is not None})
