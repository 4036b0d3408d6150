# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Speed of a training step of SiT on this machine, next to the machine's rate of matrix products.

    python benchmarks/step.py --bf16 --micro-batch 64 --budget 120 --output step.json          # on a GPU
    python benchmarks/step.py --bf16 --micro-batch 64 --budget 120 --compile --output step.json
    OMP_NUM_THREADS=1 python benchmarks/step.py --sizes S --micro-batch 2 --budget 60          # on a CPU

The step is the paper's: 128 subsets of 50 images, 50 sampling steps. --budget cuts it so that reference set and all
updates of a size take about that many seconds. The whole step is then predicted: rollout and update in proportion,
distances measured at full size.

Weights are random, but times are those of a real step, the last of --updates. The rollout includes decoding and
features. Utilisation is the network's counted operations over time, as a share of the rate of a large matrix product;
operations that checkpointing repeats count as time only.
"""

import argparse
import copy
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from results import rounded, write_table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    FrechetDistance,
    InceptionV3,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
)

PHASES = {"rollout": "rollout", "reward": "reward", "update": "training"}  # with the trainer's names


class Thumbnails(nn.Module):
    dimension = 48

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures FLOP/s of square matrix products, the best of three sizes."""
    rates = []
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for count in (1, 100 if device.type == "cuda" else 10):  # the first warms up
            seconds = seconds_of(lambda a=a, b=b, n=count: [a @ b for _ in range(n)], device)
        rates.append(2 * size**3 * count / seconds)
    return max(rates)


def counted_flops(size: str) -> tuple[int, int]:
    """Counts operations of one sample, forward alone and with backward; attention counts as two products."""
    model = SiTTransformer2DModel.from_size(size).to("meta")
    x, t, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    inputs = [value.to("meta") for value in (x, t, labels)]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(*inputs)
        with FlopCounterMode(display=False) as both:
            model(*inputs).sample.sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def real_statistics(dimension: int) -> FeatureStatistics:
    return FeatureStatistics.from_moments(torch.zeros(dimension), torch.eye(dimension), count=10 * dimension)


def build(size: str, args: argparse.Namespace, folder: str) -> DistributionRewardTrainer:
    torch.manual_seed(0)
    transformer = SiTTransformer2DModel.from_size(size)
    nn.init.normal_(transformer.final_layer.linear.weight, std=0.02)
    cuda = args.device.type == "cuda"  # then with Stable Diffusion's decoder and Inception; both are tiny on a CPU
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if cuda else (4,) * 4,
        norm_num_groups=32 if cuda else 2,
        layers_per_block=2 if cuda else 1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=256,
    )
    extractor = InceptionV3() if cuda else Thumbnails()
    config = DiffusionDistributionConfig(
        output_dir=folder,
        max_steps=args.updates,
        reference_set_size=args.reference_set,
        num_subsets=args.subsets,
        replace_size=args.replace_size,
        top_advantage_quantile=args.top,
        num_inference_steps=args.steps,
        rollout_batch_size=args.micro_batch,
        per_device_train_batch_size=args.micro_batch,
        per_device_eval_batch_size=args.micro_batch,
        bf16=args.bf16,
        torch_compile=args.compile,
        activation_checkpointing=args.activation_checkpointing,
        use_cpu=not cuda,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_samples=False,
    )
    reward = SubsetReplaceReward(extractor, real_statistics(extractor.dimension))
    return DistributionRewardTrainer(SiTPipeline(transformer, vae), reward, config)


def time_update(size: str, args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """Returns seconds of the last update by phase, and the number of pairs that it trains on."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(size, args, folder)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "seconds/rollout" in entry][-1]
    return {phase: log[f"seconds/{name}"] for phase, name in PHASES.items()}, trainer.estimator.num_passes()


def time_distances(args: argparse.Namespace) -> float:
    """Measures seconds of the distances of a whole step."""
    dimension = 2048 if args.device.type == "cuda" else Thumbnails.dimension
    indices = torch.stack([torch.randperm(args.reference_set)[: args.replace_size] for _ in range(args.subsets)])
    new = torch.randn(*indices.shape, dimension, device=args.device)
    distance = FrechetDistance(real_statistics(dimension))
    distance.fit(torch.randn(args.reference_set, dimension, device=args.device)).replaced(indices[:1], new[:1])
    return seconds_of(lambda: distance.replaced(indices, new), args.device)


def within_budget(args: argparse.Namespace, per_image: dict[str, float]) -> argparse.Namespace:
    """Cuts the step to `args.budget` seconds, from seconds per new image: fewer subsets, smaller ones, fewer steps."""
    if args.budget is None:
        return args
    images = args.budget / (args.updates * sum(per_image.values()) + per_image["rollout"])  # with the reference set
    cut = copy.copy(args)
    if images >= args.subsets * args.replace_size:
        cut.reference_set = min(args.reference_set, int(images))
        return cut
    least = 4  # subsets, of which one is trained on
    cut.replace_size = max(1, min(args.replace_size, int(images / least)))
    cut.subsets = max(least, int(images / cut.replace_size))
    cut.steps = max(3, min(args.steps, int(args.steps * images / least)))
    cut.reference_set = cut.subsets * cut.replace_size + 1
    return cut


def run(size: str, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    pilot = copy.copy(args)
    pilot.subsets, pilot.replace_size = 4, math.ceil(args.micro_batch / 4)
    count = pilot.subsets * pilot.replace_size
    pilot.reference_set = count + 1
    per_image = {phase: value / count for phase, value in time_update(size, pilot)[0].items()}
    cut, asked = within_budget(args, per_image), args.subsets * args.replace_size
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, pairs = time_update(size, cut)
    images = cut.subsets * cut.replace_size
    scale = asked / images * args.steps / cut.steps
    whole = {
        "rollout": seconds["rollout"] * scale,
        "update": seconds["update"] * scale,
        "reward": time_distances(args),
    }
    forward, both = counted_flops(size)
    return {
        "size": size,
        "step": {name: getattr(cut, name) for name in ("subsets", "replace_size", "steps", "reference_set")},
        "seconds": seconds,
        "rollout_images_per_second": images / seconds["rollout"],
        "update_pairs_per_second": pairs / seconds["update"],
        "rollout_utilisation": forward * images * cut.steps / seconds["rollout"] / ceiling,
        "update_utilisation": both * pairs / seconds["update"] / ceiling,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None,
        "whole_step_seconds": whole,
        "whole_step_reward_share": whole["reward"] / sum(whole.values()),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["S", "B", "XL"], help="S, B, L or XL, with patches of 2 or /4, /8"
    )
    parser.add_argument("--subsets", type=int, default=128)
    parser.add_argument("--replace-size", type=int, default=50)
    parser.add_argument("--reference-set", type=int, default=5000)
    parser.add_argument("--budget", type=float, help="seconds for the updates of each size; the step is cut to fit")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--top", type=float, default=0.25, help="share of the subsets that is trained on")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = matrix_product_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}: {ceiling / 1e12:.3f} TFLOP/s in matrix products")
    rows = []
    for size in args.sizes:
        rows.append(rounded(run(size, args, ceiling), 4))
        print(*(f"  {key}: {value}" for key, value in rows[-1].items()), sep="\n", flush=True)
    if args.output:
        write_table(args.output, rows, device=name, threads=torch.get_num_threads(), flops_per_second=ceiling)


if __name__ == "__main__":
    main()
