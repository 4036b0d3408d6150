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
import os
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from ..trainer.callbacks import LogSamplesCallback
from ..trainer.merge_card import comparison_table
from ..trainer.merge_coefficient_config import METHODS, MergeCoefficientConfig
from ..trainer.merge_coefficient_trainer import MergeCoefficientTrainer
from . import cli
from .arguments import (
    RewardArguments,
    build_metrics,
    build_rewards,
    find_real_statistics,
    load_conditions,
    shown_sampler,
)
from .common import checkpoint_to_resume, finish, finish_interrupted, make_trl_parser


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
    baselines: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other methods to compare with, each with as many images: grid, cma, emanet. What only "
            "they have a use for is at its default."
        },
    )


def make_parser() -> TrlParser:
    return make_trl_parser((MergeArguments, MergeCoefficientConfig), __doc__, "trl-distreward merge")


def main(argv: list[str] | None = None) -> None:
    arguments, config = make_parser().parse_args_and_config(argv)
    run(arguments, config, arguments.model, arguments.checkpoints)


def run(arguments: MergeArguments, config: MergeCoefficientConfig, model: Any, checkpoints: list[str]) -> None:
    """Merges `checkpoints` as the options say, and writes what came of it."""
    logging.getLogger("trl_distreward").setLevel(logging.INFO)
    logging.getLogger("trl_distreward").addHandler(logging.StreamHandler())
    if not checkpoints:
        raise ValueError("there is nothing to merge: give checkpoints.")
    odd = [method for method in arguments.baselines if method not in METHODS or method == config.method]
    if odd:
        others = ", ".join(method for method in METHODS if method != config.method)
        raise ValueError(f"baselines={odd} are unknown, or the method itself: choose from {others}.")
    baselines = {
        method: config.with_method(
            method, push_to_hub=False, output_dir=os.path.join(str(config.output_dir), "baselines", method)
        )
        for method in arguments.baselines
    }
    # once, in the folder of the run: baselines have the same
    arguments.real_statistics = find_real_statistics(arguments, str(config.output_dir))
    arguments.real_images = None
    trainer = build_trainer(arguments, config, model, checkpoints)
    if arguments.log_samples:
        trainer.add_callback(LogSamplesCallback(trainer, sampler=shown_sampler(config)))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config))
    if trainer.interrupted:
        finish_interrupted(trainer)
        return
    found = {}
    for method, baseline in baselines.items():
        other = build_trainer(arguments, baseline, model, checkpoints)
        last = get_last_checkpoint(baseline.output_dir) if os.path.isdir(baseline.output_dir) else None
        other.train(resume_from_checkpoint=last if checkpoint_to_resume(config) else None)
        if other.interrupted:
            if config.save_strategy == "no":  # the method itself has ended, and is not to be run again
                trainer._save_checkpoint(trainer.model, trial=None)
            finish_interrupted(other)
            return
        found[method] = other.coefficients
    if arguments.compare:
        table = comparison_table(trainer.compare(found))
        if trainer.accelerator.is_main_process:
            print(table)
    if config.push_to_hub:
        trainer.push_to_hub()  # which saves, with the model card
    else:
        trainer.create_model_card()
        trainer.save_model()
    finish(trainer)


def build_trainer(
    arguments: MergeArguments, config: MergeCoefficientConfig, model: Any, checkpoints: list[str]
) -> MergeCoefficientTrainer:
    dataset = load_conditions(arguments)
    rewards = build_rewards(arguments, config.output_dir)
    return MergeCoefficientTrainer(
        model=model,
        checkpoints=checkpoints,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset,
        eval_metrics=build_metrics(arguments, rewards),
    )


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.merge", main)
