# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
A first real run: lowers the FID of google/ddpm-cifar10-32, an unconditional DDPM of 32x32 images, on one GPU.

    python examples/cifar10.py --dry-run    # memory, seconds and device-hours on this machine; trains nothing
    python examples/cifar10.py
    python examples/cifar10.py --tiny       # every part in seconds on a CPU, with random weights and images

Training takes 357,200 network evaluations, and each of the two evaluations 50,000 more.
"""

import argparse

import numpy as np
from datasets import Dataset, load_dataset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureDistance,
    SubsetReplaceReward,
    dry_run,
    load_feature_extractor,
)


def real_parts():
    """The model; features and real images of the reward; features and real images that judge the result."""
    cifar10 = load_dataset("uoft-cs/cifar10")  # columns "img" and "label": the one of images is found
    inception, dinov2 = load_feature_extractor("inception"), load_feature_extractor("dinov2")
    return "google/ddpm-cifar10-32", (inception, cifar10["train"]), (dinov2, cifar10["test"])


def tiny_parts():
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    pipeline = DDPMPipeline(UNet2DModel(sample_size=8, norm_num_groups=4, **blocks), DDPMScheduler())
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    images = Dataset.from_dict({"img": [Image.fromarray(image) for image in pixels]})
    parts = (lambda x: x.float().mean(dim=(2, 3)), images)  # features: any function of uint8 images (B, 3, H, W)
    return pipeline, parts, parts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what the run would take, and stop")
    parser.add_argument("--tiny", action="store_true", help="random weights and images, and a few steps")
    arguments = parser.parse_args(argv)
    model, reward, judge = tiny_parts() if arguments.tiny else real_parts()
    settings = {
        "max_steps": 100,  # updates
        "reference_set_size": 2500,  # generated images that are compared with real ones; above Inception's 2,048
        "num_subsets": 128,  # new images of an update, each with a reward of its own
        "num_inference_steps": 20,  # in place of the 1,000 that the model was trained with
        "learning_rate": 1e-5,  # as in the paper
        "ema_decay": 0.9,  # of the average of the weights, which is evaluated and saved
        "per_device_train_batch_size": 64,  # images at a time in the backward pass: lower it for less memory
    }
    if arguments.tiny:
        settings |= {"max_steps": 2, "reference_set_size": 32, "num_subsets": 8, "num_inference_steps": 3}
    trainer = DistributionRewardTrainer(
        model=model,
        reward_funcs=SubsetReplaceReward(*reward),
        args=DiffusionDistributionConfig("outputs/cifar10", **settings),
        eval_metrics={"judge": FeatureDistance(*judge)},  # in features that the reward does not see
    )
    if arguments.dry_run:
        print(dry_run(trainer))
        return
    before = trainer.evaluate()
    trainer.train()  # writes grids of images from the same noise to the folder `samples`
    after = trainer.evaluate()
    trainer.save_model()  # DDPMPipeline.from_pretrained("outputs/cifar10") loads it
    print(*(f"{name}: {before[name]} -> {after[name]}" for name in ("eval_ode_distance_features", "eval_ode_judge")))


if __name__ == "__main__":
    main()
