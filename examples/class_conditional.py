# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Trains a class-conditional model, DiT-XL/2 on ImageNet 256x256, by the distance of its images from real ones.

    python examples/class_conditional.py
"""

from peft import LoraConfig

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    SubsetReplaceReward,
    load_feature_extractor,
)

reward = SubsetReplaceReward(
    load_feature_extractor("inception"),
    "VIRTUAL_imagenet256_labeled.npz",  # ADM's reference batch; or a folder of real images, or a datasets.Dataset
)
trainer = DistributionRewardTrainer(
    model="facebook/DiT-XL-2-256",
    reward_funcs=reward,
    args=DiffusionDistributionConfig(
        output_dir="outputs/class_conditional", guidance_scale=1.5, learning_rate=1e-4, bf16=True
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32),  # without it all weights are trained
)  # all classes alike; train_dataset=Dataset.from_dict({"label": [207, 207, 360]}) would choose them
print(trainer.evaluate())
trainer.train()
print(trainer.evaluate())
trainer.save_model()  # a DiTPipeline
