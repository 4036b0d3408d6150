# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes a pipeline on distribution-wise rewards.

    trl-distreward train --config recipe.yaml
    accelerate launch --multi_gpu -m trl_distreward.scripts.train --config recipe.yaml --learning_rate 2e-5
    trl-distreward train --config recipe.yaml --dry-run

--dry-run measures one micro-batch and prints what the run would take: memory, seconds, device-hours, disk. A run that
cannot fit is refused.

Every field of DiffusionDistributionConfig and of TrainingArguments is an option, on the command line or in the YAML
file; the command line wins.
"""

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from trl import TrlParser

from ..rewards.subset_replace import CREDITS
from ..trainer.callbacks import LogSamplesCallback
from ..trainer.distribution_reward_config import DiffusionDistributionConfig
from ..trainer.distribution_reward_trainer import DistributionRewardTrainer
from ..trainer.dry_run import check_resources, dry_run, format_prediction
from .arguments import HelpFormatter, RewardArguments, build_metrics, build_rewards, load_conditions


@dataclass
class TrainArguments(RewardArguments):
    """What is trained, on what reward, and what is watched."""

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
    log_samples: bool = field(default=True, metadata={"help": "Write grids of samples."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print what the run would take, measured on one micro-batch, and stop."}
    )


def make_parser() -> TrlParser:
    return TrlParser(
        (TrainArguments, DiffusionDistributionConfig),
        prog="trl-distreward train",
        description=__doc__,
        formatter_class=HelpFormatter,
    )


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
        trainer.add_callback(LogSamplesCallback(trainer))
    resume: str | bool | None = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if config.push_to_hub:
        trainer.push_to_hub()  # which saves, with the model card
    else:
        trainer.save_model()
    finish(trainer)


def build_trainer(
    arguments: TrainArguments, config: DiffusionDistributionConfig, model: Any
) -> DistributionRewardTrainer:
    peft_config = None
    if arguments.use_peft:
        peft_config = LoraConfig(
            r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=arguments.lora_target_modules
        )
    return DistributionRewardTrainer(
        model=model,
        reward_funcs=build_rewards(arguments, credit=arguments.credit, control_variate=arguments.control_variate),
        args=config,
        train_dataset=load_conditions(arguments),
        eval_metrics=build_metrics(arguments),
        peft_config=peft_config,
    )


def finish(trainer: DistributionRewardTrainer) -> None:
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
