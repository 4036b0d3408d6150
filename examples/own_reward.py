# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Trains an adapter of Stable Diffusion by a reward of your own, which reads a column of the dataset. A distance from
real images stands beside it: a reward for single images alone costs diversity.

    python examples/own_reward.py
"""

import torch
from datasets import load_dataset
from peft import LoraConfig
from PIL import ImageStat

from trl_distreward import DiffusionDistributionConfig, DistributionRewardTrainer, SubsetReplaceReward

captions = load_dataset("lambdalabs/naruto-blip-captions", split="train")  # columns "image" and "text"
captions = captions.map(lambda row: {"brightness": ImageStat.Stat(row["image"].convert("L")).mean[0] / 255})


def brightness_asked_for(images, brightness, log_metric, **kwargs):
    """Minus the difference from the column `brightness`. `images` are uint8 (B, 3, H, W); it returns one per image."""
    found = images.float().mean(dim=(1, 2, 3)) / 255
    log_metric("brightness", found.mean())
    return -(found - torch.tensor(brightness, device=images.device)).abs()


def colours(images):
    """Features of your own: colours on a 4x4 grid, (B, 48)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


trainer = DistributionRewardTrainer(
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    reward_funcs=[SubsetReplaceReward(colours, captions, real_resize=512), brightness_asked_for],
    args=DiffusionDistributionConfig(
        output_dir="outputs/own_reward", reward_weights=[1.0, 0.5], guidance_scale=7.5, learning_rate=1e-4, bf16=True
    ),
    train_dataset=captions.select_columns(["text", "brightness"]),
    peft_config=LoraConfig(r=16, lora_alpha=32),
)
trainer.train()
trainer.save_model()
