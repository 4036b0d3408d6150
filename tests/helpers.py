# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Small models, rewards and trainers that tests share."""

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    MergeCoefficientConfig,
    MergeCoefficientTrainer,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
)


def tiny_sit(seed=0, **kwargs):
    """A SiT with random weights, in the output layer as well: its velocity is not zero."""
    torch.manual_seed(seed)
    sizes = {"sample_size": 4, "in_channels": 1, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
    model = SiTTransformer2DModel(**{**sizes, "num_classes": 3, "learn_sigma": False, **kwargs})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_pipeline(seed=0, **kwargs):
    pipeline = SiTPipeline(tiny_sit(seed, **kwargs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae():
    """A VAE that decodes 4 channels to images with sides twice as long."""
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 8}
    return AutoencoderKL(**blocks, **sizes, scaling_factor=0.18215)


def features(images):
    """Eight fixed random features of a 4x4 image."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 8, generator=generator)
    return (images.float().flatten(1) / 127.5 - 1) @ weight.to(images.device)


def real_images(count=200):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 1, 4, 4), generator=generator).to(torch.uint8)


def tiny_reward(**kwargs):
    return SubsetReplaceReward(features, FeatureStatistics.from_features(features(real_images())), **kwargs)


QUIET = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "log_samples": False}


def tiny_config(output_dir, **kwargs):
    rewards = {"reference_set_size": 24, "reference_update": "refresh", "num_subsets": 6, "replace_size": 2}
    images = {"num_inference_steps": 4, "per_device_eval_batch_size": 5, "rollout_batch_size": 7}
    evaluation = {"num_inference_steps_eval": 5, "eval_samplers": ["sde", "ode"]}
    updates = {"max_steps": 2, "top_advantage_quantile": 0.5, "per_device_train_batch_size": 7, "ema_decay": 0.0}
    rate = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    estimator = {"loss_type": "grpo", "sampler": "sde", "transport_advantage": 0.0}
    settings = {**estimator, **rewards, **images, **evaluation, **updates, **rate, **QUIET, **kwargs}
    return DiffusionDistributionConfig(output_dir=str(output_dir), **settings)


def tiny_trainer(
    output_dir,
    model=None,
    reward_funcs=None,
    peft_config=None,
    eval_metrics=None,
    eval_dataset=None,
    train_dataset=None,
    **kwargs,
):
    return DistributionRewardTrainer(
        model=tiny_pipeline() if model is None else model,
        reward_funcs=tiny_reward() if reward_funcs is None else reward_funcs,
        args=tiny_config(output_dir, **kwargs),
        peft_config=peft_config,
        eval_metrics=eval_metrics,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )


def trained(output_dir, **kwargs):
    """A tiny trainer after `train()`, one update by default."""
    trainer = tiny_trainer(output_dir, **{"max_steps": 1, **kwargs})
    trainer.train()
    return trainer


def fill_by_pattern(module):
    """
    Fills weights and statistics by integer arithmetic, the same for every release and machine: uniform numbers that
    keep activations of order one through ReLU layers.
    """
    with torch.no_grad():
        state = [(name, value) for name, value in module.state_dict().items() if value.is_floating_point()]
        for number, (name, tensor) in enumerate(sorted(state)):
            index = torch.arange(tensor.numel()) + number * 1_000_003
            index = ((index ^ (index >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
            index = ((index ^ (index >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
            uniform = ((index ^ (index >> 16)).double() / 2**31 - 1).view_as(tensor)  # in [-1, 1)
            if name.endswith("running_var") or name.endswith("bn.weight"):
                uniform = 1 + uniform / 4
            elif tensor.ndim > 1:
                uniform = uniform * (6 / tensor[0].numel()) ** 0.5
            else:
                uniform = uniform / 4
            tensor.copy_(uniform)
    return module


def pattern_images(*shape):
    """Smooth uint8 images, made by integer arithmetic."""
    index = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1, 1)
    row, column = torch.arange(shape[2]).view(-1, 1), torch.arange(shape[3])
    return ((row * (index + 2) + column * (5 - index) + row * column // 7 + 40 * index) % 256).to(torch.uint8)


def tiny_pool(folder, count=4):
    """Files of checkpoints that drift apart, as in a training run."""
    paths, weights = [], {name: value.clone() for name, value in tiny_sit(0).state_dict().items()}
    for index in range(count):
        torch.manual_seed(100 + index)
        weights = {n: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for n, v in weights.items()}
        paths.append(str(folder / f"step-{index}.safetensors"))
        save_file(weights, paths[-1])
    return paths


def tiny_merge_trainer(
    output_dir,
    checkpoints=None,
    reward_funcs=None,
    callbacks=None,
    eval_metrics=None,
    train_dataset=None,
    eval_dataset=None,
    **kwargs,
):
    if checkpoints is None:
        (output_dir / "pool").mkdir(parents=True, exist_ok=True)
        checkpoints = tiny_pool(output_dir / "pool")
    sizes = {"max_steps": 3, "num_generations": 5, "reference_set_size": 20, "num_inference_steps": 3}
    defaults = {**sizes, "per_device_eval_batch_size": 16, **QUIET}
    return MergeCoefficientTrainer(
        model=tiny_pipeline(),
        checkpoints=checkpoints,
        reward_funcs=tiny_reward() if reward_funcs is None else reward_funcs,
        args=MergeCoefficientConfig(output_dir=str(output_dir), **{**defaults, **kwargs}),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_metrics=eval_metrics,
        callbacks=callbacks,
    )


def two_spaces():
    """A reward in two feature spaces, whose units are their first distances."""
    extractors = {"features": features, "squares": lambda x: features(x) ** 2}
    real = {name: FeatureStatistics.from_features(extract(real_images())) for name, extract in extractors.items()}
    return SubsetReplaceReward(extractors, real)
