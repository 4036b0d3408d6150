# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
How fast a training step of SiT is on this machine, beside what the machine can do.

    python benchmarks/step.py --bf16 --micro-batch 64 --budget 120 --output step.json          # on a GPU
    python benchmarks/step.py --bf16 --micro-batch 64 --budget 120 --compile --output step.json
    OMP_NUM_THREADS=1 python benchmarks/step.py --sizes S --micro-batch 2 --budget 60          # on a CPU

The step is the paper's, 128 subsets of 50 and 50 steps, or with --budget as much of it as is predicted to take so many
seconds for each size, reference set and all updates. What the whole step would take is predicted, as --dry-run does,
from micro-batches and the reward at its full size.

Weights are random, times are not: rollout, update and reward are those of a real step, the last of --updates. The
ceiling is the rate of a large matrix product; model-FLOP utilisation is the network's counted operations (a
multiplication and an addition are two) over time, as a share of it. The rollout's time has decoding in it, but not the
features, which are the reward's. What checkpointing computes again counts as time, not as operations.
"""

import argparse
import copy
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    SiTPipeline,
    SiTTransformer2DModel,
    SubsetReplaceReward,
)
from trl_distreward.metrics.inception import InceptionV3
from trl_distreward.trainer.dry_run import Prediction, dry_run

# Widths of the decoder's levels: of Stable Diffusion's, which SiT's latents are of, and of one that costs nothing
DECODERS = {"sd": (128, 256, 512, 512), "tiny": (4, 4, 4, 4)}
PHASES = {"rollout": "rollout", "reward": "reward", "update": "training"}  # and what the trainer logs them as


class Thumbnails(nn.Module):
    dimension = 48

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def matrix_product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products, the best of three sizes."""
    rates = []
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        a @ b
        synchronize(device)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(10 if device.type == "cuda" else 1):
                a @ b
                count += 1
            synchronize(device)
        rates.append(2 * size**3 * count / (time.perf_counter() - started))
    return max(rates)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counted_flops(size: str) -> tuple[int, int]:
    """Operations of one sample forward, and forward and backward; attention as the two products that it is."""
    model = SiTTransformer2DModel.from_size(size).to("meta")
    x, t, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    inputs = [value.to("meta") for value in (x, t, labels)]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(*inputs)
        with FlopCounterMode(display=False) as both:
            model(*inputs).sample.sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def build(size: str, args: argparse.Namespace, folder: str) -> DistributionRewardTrainer:
    torch.manual_seed(0)
    transformer = SiTTransformer2DModel.from_size(size)
    nn.init.normal_(transformer.final_layer.linear.weight, std=0.02)
    widths = DECODERS[args.decoder]
    vae = AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=min(32, widths[0] // 2),
        layers_per_block=2 if args.decoder == "sd" else 1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=256,
    )
    extractor = InceptionV3() if args.extractor == "inception" else Thumbnails()
    d = extractor.dimension
    real = FeatureStatistics.from_moments(torch.zeros(d), torch.eye(d), count=10 * d)
    config = DiffusionDistributionConfig(
        output_dir=folder,
        max_steps=args.updates,
        reference_set_size=args.reference_set,
        num_subsets=args.subsets,
        replace_size=args.replace_size,
        top_advantage_quantile=args.top,
        num_inference_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        per_device_eval_batch_size=args.rollout_batch or args.micro_batch,
        rollout_batch_size=args.rollout_batch,
        bf16=args.bf16,
        torch_compile=args.compile,
        activation_checkpointing=args.activation_checkpointing,
        use_cpu=args.device.type == "cpu",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return DistributionRewardTrainer(SiTPipeline(transformer, vae), SubsetReplaceReward(extractor, real), config)


def within_budget(args: argparse.Namespace, prediction: Prediction) -> argparse.Namespace:
    """As much of the step as fits `args.budget` seconds: fewer subsets, then smaller ones, then fewer steps."""
    if args.budget is None:
        return args
    asked = args.subsets * args.replace_size
    step = sum(prediction.seconds[phase] for phase in PHASES) / asked  # seconds per new image
    reference = prediction.seconds["rollout"] / asked  # and per image of the reference set
    images = args.budget / (args.updates * step + reference)  # with a reference set of as many
    scaled = copy.copy(args)
    if images >= asked:
        scaled.reference_set = min(args.reference_set, int(images))
        return scaled
    least = 4  # subsets that leave one to train on
    scaled.replace_size = max(1, min(args.replace_size, int(images / least)))
    scaled.subsets = max(least, int(images / scaled.replace_size))
    scaled.steps = max(3, min(args.steps, int(args.steps * images / least)))
    scaled.reference_set = scaled.subsets * scaled.replace_size + 1
    return scaled


def run(size: str, args: argparse.Namespace, ceiling: float) -> dict:
    forward, both = counted_flops(size)
    with tempfile.TemporaryDirectory() as folder:
        whole = prediction = dry_run(build(size, args, folder))
        args = within_budget(args, whole)
        prediction = dry_run(build(size, args, folder)) if args.budget else whole
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = build(size, args, folder)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "seconds/rollout" in entry][-1]
    seconds = {phase: log[f"seconds/{name}"] for phase, name in PHASES.items()}
    images = args.subsets * args.replace_size
    pairs = round(prediction.evaluations.update)
    evaluations = prediction.evaluations.rollout
    measured = {
        "step": {name: getattr(args, name) for name in ("subsets", "replace_size", "steps", "reference_set")},
        "seconds": seconds,
        "rollout_images_per_second": images / seconds["rollout"],
        "update_pairs_per_second": pairs / seconds["update"],
        "reward_seconds": seconds["reward"],
        "reward_share": seconds["reward"] / sum(seconds.values()),
        "rollout_utilisation": forward * evaluations / seconds["rollout"] / ceiling,
        "update_utilisation": both * pairs / seconds["update"] / ceiling,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None,
    }
    print(
        f"SiT-{size}: rollout {measured['rollout_images_per_second']:.2f} images/s at "
        f"{measured['rollout_utilisation']:.1%}, update {measured['update_pairs_per_second']:.2f} pairs/s at "
        f"{measured['update_utilisation']:.1%} of the matrix-product rate, reward {seconds['reward']:.3f} s"
    )
    predicted, full = ({phase: p.seconds[phase] for phase in PHASES} for p in (prediction, whole))
    print(f"  of {images} images, {args.steps} steps: seconds {rounded(seconds)}, predicted {rounded(predicted)}")
    print(f"  the step asked for, predicted: {rounded(full)}, reward {full['reward'] / sum(full.values()):.2%}")
    return {
        "forward_flops": forward,
        "forward_backward_flops": both,
        **measured,
        "predicted_seconds": predicted,
        "predicted_peak_memory_bytes": max(prediction.memory[phase] for phase in PHASES),
        "predicted_whole_step_seconds": full,
        "predicted_whole_step_reward_share": full["reward"] / sum(full.values()),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--sizes", nargs="+", default=["S", "B", "XL"], help="S, B, L, XL, with patches of 2 or /4, /8"
    )
    parser.add_argument("--subsets", type=int, default=128)
    parser.add_argument("--replace-size", type=int, default=50)
    parser.add_argument("--reference-set", type=int, default=5000)
    parser.add_argument("--budget", type=float, help="seconds for each size's updates; the step is cut to fit")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--top", type=float, default=0.25, help="share of the subsets that is trained on")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--rollout-batch", type=int)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="sd" if cuda else "tiny")
    parser.add_argument(
        "--extractor", choices=["inception", "thumbnails"], default="inception" if cuda else "thumbnails"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = matrix_product_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}: {ceiling / 1e12:.3f} TFLOP/s in matrix products")
    options = {key: value for key, value in vars(args).items() if key not in ("sizes", "output", "device")}
    result = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": options,
        "matrix_product_flops_per_second": ceiling,
        "sizes": {size: run(size, args, ceiling) for size in args.sizes},
    }
    if any(not math.isfinite(row["update_utilisation"]) for row in result["sizes"].values()):
        raise ValueError("a measurement is not finite: raise --updates.")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
