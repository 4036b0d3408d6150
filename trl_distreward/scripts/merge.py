# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Learns with which coefficients to merge checkpoints, and writes the merged pipeline.

    trl-distreward merge --config recipe.yaml
    trl-distreward merge --model run --checkpoints run/checkpoint-400 run/checkpoint-450 my-org/model@v2 ...
    accelerate launch --multi_gpu -m trl_distreward.scripts.merge --config recipe.yaml --method emanet

Every field of MergeCoefficientConfig and of TrainingArguments is an option, on the command line or in the YAML file;
the command line wins.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from ..trainer.merge_card import comparison_table
from ..trainer.merge_coefficient_config import MergeCoefficientConfig
from ..trainer.merge_coefficient_trainer import MergeCoefficientTrainer
from .arguments import RewardArguments, build_metrics, build_rewards, load_conditions


@dataclass
class MergeArguments(RewardArguments):
    """What is merged, on what reward, and what is watched."""

    checkpoints: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders, .safetensors files or 'org/repo@revision:subfolder', in the order of training."},
    )
    compare: bool = field(
        default=True, metadata={"help": "Evaluate the last checkpoint, the uniform average and the start as well."}
    )


def make_parser() -> TrlParser:
    return TrlParser((MergeArguments, MergeCoefficientConfig), description=__doc__)


def main(argv: list[str] | None = None) -> None:
    arguments, config = make_parser().parse_args_and_config(argv)
    run(arguments, config, arguments.model, arguments.checkpoints)


def run(arguments: MergeArguments, config: MergeCoefficientConfig, model: Any, checkpoints: list[str]) -> None:
    """Merges `checkpoints` as the options say, and writes what came of it."""
    logging.getLogger("trl_distreward").setLevel(logging.INFO)
    logging.getLogger("trl_distreward").addHandler(logging.StreamHandler())
    if not checkpoints:
        raise ValueError("there is nothing to merge: give checkpoints.")
    trainer = MergeCoefficientTrainer(
        model=model,
        checkpoints=checkpoints,
        reward_funcs=build_rewards(arguments),
        args=config,
        train_dataset=load_conditions(arguments),
        eval_metrics=build_metrics(arguments),
    )
    resume: str | bool | None = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if arguments.compare:
        table = comparison_table(trainer.compare())
        if trainer.accelerator.is_main_process:
            print(table)
    if config.push_to_hub:
        trainer.push_to_hub()  # which saves, with the model card
    else:
        trainer.create_model_card()
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
