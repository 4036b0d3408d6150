# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Measure on a GPU, in at most ten minutes, what docs/howto/costs.md predicts.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --tiny --output tiny.json   # tiny networks, on a CPU: whether the script works

Weights are random; nothing is downloaded. Utilisation is counted operations over seconds, as a share of the rate of
large matrix products that is measured first. An update is one of SiT-XL/2 by each estimator, of few images and steps.
Parts that would begin after --budget seconds are null.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from costs import edm2, sit, unet
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from results import rounded, write_table
from torch import Tensor, nn

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    EDM2Pipeline,
    EDM2UNet2DModel,
    FeatureStatistics,
    FrechetDistance,
    InceptionV3,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
    as_policy,
)
from trl_distreward.conditions import balanced_labels
from trl_distreward.trainer import costs
from trl_distreward.trainer.estimators import ESTIMATORS

Values = dict[str, Any]
PHASES = {"rollout": "rollout", "reward": "reward", "update": "training", "refresh": "refresh"}  # the trainer's names
FULL: Values = {"batch": 64, "seconds": 8.0, "images": 64, "steps": 10, "set": 256, "rows": 10_000, "width": 2048}
TINY: Values = {"batch": 2, "seconds": 0.01, "images": 8, "steps": 3, "set": 16, "rows": 100, "width": 16}


class Thumbnails(nn.Module):
    """Stands for Inception in the tiny mode."""

    dimension = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def tiny_sit() -> Any:
    network = SiTTransformer2DModel(sample_size=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3)
    decoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    return as_policy(SiTPipeline(network, decoder))


def tiny_edm2() -> Any:
    sizes: Values = {"sample_size": 8, "num_classes": 3, "model_channels": 16, "num_blocks": 1}
    network = EDM2UNet2DModel(**sizes, channel_mult=(1, 1), attn_resolutions=(4,), channels_per_head=8)
    return as_policy(EDM2Pipeline(network))


def tiny_unet() -> Any:
    blocks: Values = {"down_block_types": ("DownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    network = UNet2DModel(8, block_out_channels=(16,), norm_num_groups=4, layers_per_block=1, **blocks)
    return as_policy(DDPMPipeline(network, DDPMScheduler()))


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of an action, and of what it has put in the device's queue."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_product_rate(device: torch.device, tiny: bool) -> float:
    """FLOP/s of square products in bfloat16, the best of three sizes."""
    rates = []
    for size in (64, 128, 256) if tiny else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        for count in (1, 2 if tiny else 50):  # the first warms up
            seconds = seconds_of(lambda a=a, b=b, n=count: [a @ b for _ in range(n)], device)
        rates.append(2 * size**3 * count / seconds)
    return max(rates)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes since the last call; `None` without a GPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


@torch.no_grad()
def measure_forward(build: Callable[[], Any], sizes: Values, device: torch.device, rate: float) -> Values:
    """Samples a second through a network, in bfloat16, compiled on a GPU."""
    policy, count = build(), sizes["batch"]
    conditions = balanced_labels(count, policy.num_conditions)
    x, t = policy.noise(conditions), torch.full((count,), 0.5)
    velocity = partial(policy.velocity, x=x, t=t, cond=policy.encode(conditions))
    flops = costs.count_network(velocity, policy.model, bf16=True).forward
    policy.model.to(device).eval()
    policy.to(device)
    compiled = torch.compile(policy.model) if device.type == "cuda" else policy.model
    x, t, cond = x.to(device), t.to(device), policy.encode(conditions)

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            policy.velocity(compiled, x, t, cond)

    warm_up = seconds_of(forward, device)
    once = min(seconds_of(forward, device) for _ in range(2))
    times = max(1, int(sizes["seconds"] / once))
    seconds = seconds_of(lambda: [forward() for _ in range(times)], device) / times
    return {
        "samples_per_second": count / seconds,
        "flops_per_sample": flops / count,
        "utilisation": flops / seconds / rate,
        "seconds_to_compile": warm_up,
        "peak_bytes": peak_bytes(device),
    }


def measure_update(name: str, tiny: bool, sizes: Values, device: torch.device, rate: float) -> Values:
    """Seconds of the second update by an estimator, by phase; with what is counted for it."""
    policy, extractor = tiny_sit() if tiny else sit(), Thumbnails() if tiny else InceptionV3()
    nn.init.normal_(policy.model.final_layer.linear.weight, std=0.02)
    width = extractor.dimension
    real = FeatureStatistics.from_moments(torch.zeros(width), torch.eye(width), count=10 * width)
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionDistributionConfig(
            folder,
            loss_type=name,
            max_steps=2,
            num_subsets=sizes["images"],
            reference_set_size=sizes["set"],
            num_inference_steps=sizes["steps"],
            rollout_batch_size=sizes["batch"],
            per_device_train_batch_size=min(sizes["batch"], 16),  # back-propagation holds several steps
            per_device_eval_batch_size=sizes["batch"],
            bf16=True,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_samples=False,
        )
        trainer = DistributionRewardTrainer(policy, SubsetReplaceReward(extractor, real), args)
        plan = costs.Plan.of(trainer)
        flops, parts = costs.count(trainer, plan)
        peak_bytes(device)
        trainer.train()
    logs = trainer.state.log_history
    seconds = {}
    for phase, logged in PHASES.items():
        seconds[phase] = [entry[f"seconds/{logged}"] for entry in logs if f"seconds/{logged}" in entry][-1]
    flops["refresh"] *= plan.steps / plan.refreshes
    return {
        "seconds": seconds,
        "utilisation": {phase: flops[phase] / seconds[phase] / rate for phase in ("rollout", "update", "refresh")},
        "counted_bytes": sum(parts.values()),
        "peak_bytes": peak_bytes(device),
    }


def measure_frechet(sizes: Values, device: torch.device) -> Values:
    """Seconds of the distance of a set, and of replacing each of its rows by itself."""
    rows, width = sizes["rows"], sizes["width"]
    generator = torch.Generator(device).manual_seed(0)
    old, new = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    distance = FrechetDistance(FeatureStatistics.from_features(new + 0.1))
    slots = torch.arange(rows, device=device)[:, None]
    for _ in range(2):  # the first warms up
        fit = seconds_of(lambda: distance.fit(old), device)
        replaced = seconds_of(lambda: distance.replaced(slots, new[:, None]), device)
    return {"rows": rows, "width": width, "fit": fit, "replaced": replaced, "peak_bytes": peak_bytes(device)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny networks and sizes, for a CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no part begins")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    args, started = make_parser().parse_args(argv), time.perf_counter()
    tiny, sizes = args.tiny, TINY if args.tiny else FULL
    device = torch.device("cpu" if tiny else "cuda")
    torch.manual_seed(0)
    rate = matrix_product_rate(device, tiny)
    networks = (tiny_sit, tiny_edm2, tiny_unet) if tiny else (sit, edm2, unet)
    names = ("SiT-XL/2", "EDM2-XS", "UNet of 35M")
    parts: dict[str, Callable[[], Values]] = {"replaced Fréchet distance": partial(measure_frechet, sizes, device)}
    for name, build in zip(names, networks, strict=True):
        parts[f"forward, {name}"] = partial(measure_forward, build, sizes, device, rate)
    for name in ESTIMATORS:
        parts[f"update, {name}"] = partial(measure_update, name, tiny, sizes, device, rate)
    rows = []
    for name, measure in parts.items():
        late = time.perf_counter() - started > args.budget
        rows.append({"part": name, "values": None if late else rounded(measure(), 4)})
        print(rows[-1], flush=True)
    about = {"device": platform.machine() if tiny else torch.cuda.get_device_name(), "tiny": tiny}
    about |= {"matmul_flops_per_second": rounded(rate, 4), "seconds": rounded(time.perf_counter() - started, 4)}
    write_table(args.output, rows, **about)


if __name__ == "__main__":
    main()
