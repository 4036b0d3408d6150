# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Trains an adapter of Stable Diffusion 3.5 medium by two rewards: the distance of images with their prompts from real
images with theirs, and PickScore.

    python examples/text_to_image_lora.py
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    JointTextFeatures,
    SubsetReplaceReward,
    as_policy,
    load_clip,
    load_pipeline,
)
from trl_distreward.rewards import pick_score

captions = load_dataset("lambdalabs/naruto-blip-captions", split="train")  # columns "image" and "text"
clip = load_clip("openai/clip-vit-large-patch14")
joint = JointTextFeatures(clip, clip.prompts, scale=1)  # embeddings of an image and of its prompt, of length 1 each
trainer = DistributionRewardTrainer(
    model=as_policy("stabilityai/stable-diffusion-3.5-medium", guidance_scale=4.5, height=512, width=512),
    reward_funcs=[
        # "kernel", because there are fewer images than numbers in the features
        SubsetReplaceReward(joint, captions, distance="kernel", real_resize=512),
        pick_score(),
    ],
    args=DiffusionDistributionConfig(
        output_dir="outputs/text_to_image_lora",
        reward_weights=[1.0, 0.3],
        reference_set_size=1000,
        num_subsets=64,
        num_inference_steps=10,
        learning_rate=1e-4,
        bf16=True,
        activation_checkpointing=True,
    ),
    train_dataset=captions.select_columns("text"),
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
trainer.save_model()  # a pipeline with the adapter merged, and the adapter, which the base loads:

pipeline = load_pipeline("stabilityai/stable-diffusion-3.5-medium")
names = {"subfolder": "adapter", "weight_name": "pytorch_lora_weights.safetensors"}
pipeline.load_lora_weights("outputs/text_to_image_lora", **names)
