# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Merges checkpoints of one run, from the Hub or from folders, with the coefficients whose images come closest to real
ones, and puts the merged model on the Hub. `my-org` stands for your name there.

    python examples/merge.py
"""

from datasets import load_dataset

from trl_distreward import (
    MergeCoefficientConfig,
    MergeCoefficientTrainer,
    SubsetReplaceReward,
    load_feature_extractor,
)

real = load_dataset("uoft-cs/cifar10", split="train")
trainer = MergeCoefficientTrainer(
    model="google/ddpm-cifar10-32",  # its weights are replaced
    # a run with push_to_hub=True, hub_strategy="all_checkpoints" puts them there
    checkpoints=[f"my-org/ddpm-run:checkpoint-{step}" for step in (60, 80, 100)],
    reward_funcs=SubsetReplaceReward(load_feature_extractor("inception"), real),
    args=MergeCoefficientConfig(output_dir="outputs/merge", hub_model_id="my-org/ddpm-merged"),
)
trainer.train()
print(trainer.coefficients)
print(trainer.compare())  # with the last checkpoint and the uniform average
trainer.save_model()  # a DDPMPipeline
trainer.push_to_hub()
