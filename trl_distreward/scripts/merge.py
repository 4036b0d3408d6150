# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Learn the coefficients with which checkpoints are merged, and write the merged pipeline.

    trl-distreward merge --config recipe.yaml
    trl-distreward merge --model run --checkpoints run/checkpoint-400 run/checkpoint-450 my-org/model@v2 ...
    accelerate launch --multi_gpu -m trl_distreward merge --config recipe.yaml --method emanet

Every field of MergeCoefficientConfig and of TrainingArguments is an option, on the command line or in the YAML file.
The command line overrides the file.
"""

from dataclasses import dataclass

from trl import TrlParser

from ..trainer.merge_coefficient_config import MergeCoefficientConfig
from ..trainer.merge_coefficient_trainer import MergeCoefficientTrainer
from ..trainer.model_card import comparison_table
from .arguments import Model, RewardArguments, build_metrics, build_rewards, load_conditions, option, run_trainer
from .common import make_trl_parser


@dataclass
class MergeArguments(RewardArguments):
    """Options of merging that the configuration does not have."""

    checkpoints: list[str] = option(
        [], "Folders, .safetensors files or 'org/repo@revision:subfolder', in the order of training."
    )
    compare: bool = option(True, "Evaluate the last checkpoint, the uniform average and the start as well.")


def make_parser() -> TrlParser:
    return make_trl_parser((MergeArguments, MergeCoefficientConfig), __doc__, "trl-distreward merge")


def main(argv: list[str] | None = None) -> None:
    arguments, config = make_parser().parse_args_and_config(argv)
    run(arguments, config, arguments.model, arguments.checkpoints)


def run(arguments: MergeArguments, config: MergeCoefficientConfig, model: Model, checkpoints: list[str]) -> None:
    """Learns the coefficients of `checkpoints`, in the order of training, and writes the merged `model`."""
    rewards = build_rewards(arguments)
    trainer = MergeCoefficientTrainer(
        model=model,
        checkpoints=checkpoints,
        reward_funcs=rewards,
        args=config,
        train_dataset=load_conditions(arguments),
        eval_metrics=build_metrics(arguments, rewards),
    )

    def compare() -> None:
        table = comparison_table(trainer.compare())
        if trainer.is_world_process_zero():
            print(table)

    run_trainer(trainer, compare if arguments.compare else None)
