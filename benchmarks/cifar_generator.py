# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Trains the colour generator of the benchmarks: a small class-conditional U-Net on 10,000 CIFAR-10 images at 32x32.

    python benchmarks/cifar_generator.py --data ../shared/data

It predicts v on the cosine schedule. The average of its weights is written to benchmarks/cifar_generator.safetensors
as float16. Takes 75 minutes of one core in float32, less where bfloat16 is native.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

WEIGHTS = Path(__file__).with_name("cifar_generator.safetensors")
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}


def new_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=16,
        num_class_embeds=10,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", rescale_betas_zero_snr=False)


def load_generator() -> DDIMPipeline:
    """The trained generator as a pipeline."""
    unet = new_unet()
    unet.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return DDIMPipeline(unet.eval(), scheduler())


def train(images: Tensor, labels: Tensor, num_steps: int, batch_size: int, learning_rate: float) -> nn.Module:
    """Trains on uint8 images `(N, 3, 32, 32)`, mirrored at random; returns the average of the weights."""
    torch.manual_seed(0)
    unet, alphas = new_unet().train(), scheduler().alphas_cumprod
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    fast_bfloat16 = torch.cpu._is_avx512_bf16_supported()  # otherwise it is emulated, and many times slower
    bar = trange(num_steps)
    for _ in bar:
        index = torch.randint(len(images), (batch_size,))
        x = images[index].float() / 127.5 - 1
        x = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, x.flip(3), x)
        steps, noise = torch.randint(len(alphas), (batch_size,)), torch.randn_like(x)
        alpha = alphas[steps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16):
            predicted = unet(alpha * x + sigma * noise, steps, labels[index]).sample
        loss = F.mse_loss(predicted.float(), alpha * noise - sigma * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(unet)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_15k.npz")
    parser.add_argument("--num-steps", type=int, default=2000, help="updates")
    parser.add_argument("--batch-size", type=int, default=64, help="images of an update")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="largest learning rate")
    args = parser.parse_args()
    data = np.load(args.data / "cifar10_15k.npz")
    images = torch.from_numpy(data["train_images"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(data["train_labels"]).long()
    trained = train(images, labels, args.num_steps, args.batch_size, args.learning_rate)
    save_file({name: value.half() for name, value in trained.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    main()
