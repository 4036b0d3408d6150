# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Predict what runs of four known models cost on GPUs. Writes the table of docs/howto/costs.md; downloads nothing.

    python benchmarks/costs.py

The networks are made from their configurations, without weights, and never run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from peft import LoraConfig, get_peft_model
from results import markdown
from torch import Tensor

from trl_distreward import (
    PAPER,
    DiffusionDistributionConfig,
    EDM2Pipeline,
    EDM2UNet2DModel,
    FeatureStatistics,
    InceptionV3,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
    as_policy,
)
from trl_distreward.conditions import balanced_labels
from trl_distreward.trainer.costs import GPUS
from trl_distreward.trainer.dry_run import GIB, predict
from trl_distreward.trainer.estimators import ESTIMATORS

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "costs.md"
MARKS = "<!-- table costs -->\n\n", "\n\n<!-- end -->"
# As in examples/configs
COMMON: dict[str, Any] = {"bf16": True, "per_device_train_batch_size": 32, "rollout_batch_size": 64}
LARGE: dict[str, Any] = {"per_device_train_batch_size": 8, "rollout_batch_size": 16, "decode_batch_size": 4}
LARGE |= {"activation_checkpointing": True, "offload_trajectories": True}


def vae(channels: int) -> AutoencoderKL:
    """Stable Diffusion's VAE: the decoder is the same in 1 to 3 but for its latents."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
    )


def sit() -> Any:
    return as_policy(SiTPipeline(SiTTransformer2DModel.from_size("XL"), vae(4)))


def edm2() -> Any:
    return as_policy(EDM2Pipeline(EDM2UNet2DModel.from_size("XS", sample_size=64), vae=vae(4)))


def sd3() -> Any:
    """SD3-medium at 512 x 512, 154 + 256 tokens of text, with guidance; each prompt is embedded once, elsewhere."""
    transformer = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
    parts = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    pipeline = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16), **parts)
    policy = as_policy(pipeline, guidance_scale=4.5, height=512, width=512)

    def embedded(prompts: list) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(len(prompts), 333, 4096), "pooled": torch.zeros(len(prompts), 2048)}

    policy.embedded = embedded
    return policy


def unet() -> Any:
    """google/ddpm-cifar10-32. Its policy computes with the scheduler's numbers, so samples are real."""
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    with torch.device("cpu"):
        policy = as_policy(DDPMPipeline(network, DDPMScheduler()))
    policy.noise = lambda conditions: torch.zeros(len(conditions), 3, 32, 32, device="cpu")
    return policy


MODELS: dict[str, Callable[[], Any]] = {
    "SiT-XL/2, 256²": sit,
    "EDM2-XS, 512²": edm2,
    "SD3-medium, 512², LoRA": sd3,
    "UNet of 35M, 32²": unet,
}


def stand_in(policy: Any, settings: dict[str, Any], reward: SubsetReplaceReward) -> Any:
    """What a prediction reads of a trainer. A trainer would move weights that are not there."""
    network = policy.model
    large = LARGE if isinstance(network, SD3Transformer2DModel) else {}
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", **COMMON, **large, **settings}
    args = DiffusionDistributionConfig("unused", **options)
    args.bind(policy)
    if large:
        network.enable_gradient_checkpointing()
        network.requires_grad_(False)
        projections = ["to_q", "to_k", "to_v", "to_out.0"]
        network = get_peft_model(network.to(torch.bfloat16), LoraConfig(r=32, target_modules=projections))
        network.to(torch.bfloat16)
    size = args.reference_set_size
    conditions = ["a prompt"] * size if policy.num_conditions is None else balanced_labels(size, policy.num_conditions)
    names = {"args": args, "policy": policy, "network": network, "skeleton": network, "conditions": conditions}
    shared = {"rewards": SimpleNamespace(of_sets=[reward], single={}), "num_eval_images": size, "steps_per_epoch": 1}
    alone = SimpleNamespace(num_processes=1, device=policy.noise([0]).device)
    reward.to(alone.device)
    extractor = reward.extractors["features"]
    reward.extract = lambda images, *_, **__: {"features": extractor(images)}  # which cannot be checked
    trainer = SimpleNamespace(**names, **shared, accelerator=alone, sampler=None)
    trainer.estimator = ESTIMATORS[args.loss_type](trainer)
    return trainer


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def row(name: str, run: str, settings: dict[str, Any], real: FeatureStatistics) -> list[str]:
    """Cells of the table for a model and a run."""
    reward = SubsetReplaceReward(InceptionV3(), real)
    with torch.device("meta"):
        policy = MODELS[name]()
    trainer = stand_in(policy, settings, reward)
    found = {gpu: predict(trainer, gpu) for gpu in GPUS}
    h100 = found["h100"]
    print(f"{name}, {run}\n{h100}\n")
    seconds = (h100.seconds[phase] for phase in ("rollout", "reward", "update", "refresh"))
    hours = (found[gpu].device_hours for gpu in ("a100", "h100"))
    return [name, run, f"{h100.memory / GIB:.0f}", *map(short, (*seconds, *hours)), "not measured"]


HEAD = ["model", "run", "GiB", "rollout", "reward", "update", "refresh", "A100 hours", "H100, H200 hours", "measured"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="rows to print")
    names = parser.parse_args().models
    real = FeatureStatistics.from_moments(torch.zeros(2048), torch.eye(2048), count=50_000)
    runs = {"default": {}, "paper's": PAPER}
    rows = [row(name, run, settings, real) for name in names for run, settings in runs.items()]
    table, (start, end) = markdown(HEAD, rows), MARKS
    print(table)
    if names == list(MODELS):
        before, _, rest = PAGE.read_text().partition(start)
        PAGE.write_text(before + start + table + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
