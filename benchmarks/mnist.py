# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
MNIST at 16x16 for benchmarks, judged by pretrained networks: LeNet-5 for the reward, MobileNet held out.

A generator that a CPU trains in minutes draws broken strokes at 28x28. The folder of data has `mnist_70k.npz`,
`lenet_mnist.pth` and `mobilenet_v1_1.0_224_trunc_pw12.npz`. Distances are FD-LeNet and FD-MobileNet, not FID.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_distreward import FeatureStatistics, JointFeatures, SiTPipeline, SiTTransformer2DModel
from trl_distreward.metrics import extract_features

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import Digits, pixel_features, train_sit  # noqa: E402

PRETRAINING_STEPS = 2000
SIZE = 16  # pixels, of 28
NUM_HELDOUT = 10_000  # real images of the held-out network, which is slow
MOBILENET_SIZE = 64
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2)


class LeNet(nn.Module):
    """LeNet-5 on uint8 images `(B, 1, H, W)`."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.c1, self.c3, self.c5 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.f6, self.f7 = nn.Linear(120, 84), nn.Linear(84, 10)
        self.load_state_dict({name.split(".", 1)[1]: value for name, value in weights.items()})
        self.requires_grad_(False).eval()

    def convolved(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=32, mode="bilinear", align_corners=False)
        x = F.max_pool2d(torch.tanh(self.c1(x)), 2)
        return F.max_pool2d(torch.tanh(self.c3(x)), 2)  # (B, 16, 5, 5)

    def middle_features(self, images: Tensor) -> Tensor:
        return self.convolved(images).mean((2, 3))

    def last_features(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.c5(self.convolved(images))).flatten(1)
        return torch.tanh(self.f6(x))  # (B, 84)

    def probabilities(self, images: Tensor) -> Tensor:
        return self.f7(self.last_features(images)).softmax(1)


class MobileNet(nn.Module):
    """MobileNet-v1 up to `conv_pw_12`, with normalizations folded into convolutions, and a linear probe."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        self.kernels, self.biases = nn.ParameterList(), nn.ParameterList()
        for name in self.layer_names():
            depthwise = name.startswith("conv_dw")
            kernel = torch.from_numpy(weights[f"{name}/{'depthwise_kernel' if depthwise else 'kernel'}"])
            kernel = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
            moments = (weights[f"{name}_bn/{key}"] for key in ("gamma", "beta", "moving_mean", "moving_variance"))
            gamma, beta, mean, variance = (torch.from_numpy(value) for value in moments)
            scale = gamma / (variance + 1e-3).sqrt()
            self.kernels.append(kernel * scale.view(-1, 1, 1, 1))
            self.biases.append(beta - mean * scale)
        self.register_buffer("probe", torch.zeros(1025, 10))
        self.requires_grad_(False).eval()

    @staticmethod
    def layer_names() -> Iterator[str]:
        yield "conv1"
        for i in range(1, 13):
            yield f"conv_dw_{i}"
            yield f"conv_pw_{i}"

    def last_features(self, images: Tensor) -> Tensor:
        x = images.float().expand(-1, 3, -1, -1) / 127.5 - 1
        x = F.interpolate(x, size=MOBILENET_SIZE, mode="bilinear", align_corners=False)
        strides = [2, *(stride for block in STRIDES for stride in (block, 1))]
        for kernel, bias, stride in zip(self.kernels, self.biases, strides, strict=True):
            if kernel.shape[-1] == 3:  # TensorFlow's "same" padding
                x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            groups = len(kernel) if kernel.shape[1] == 1 else 1
            x = F.relu6(F.conv2d(x, kernel, bias, stride, groups=groups))
        return x.mean((2, 3))  # (B, 1024)

    def fit_probe(self, features: Tensor, labels: Tensor) -> None:
        """Fits a ridge regression of one-hot labels on features."""
        design = F.pad(features.double(), (0, 1), value=1.0)
        normal = design.T @ design + 1e-2 * len(design) * torch.eye(design.shape[1], dtype=torch.float64)
        self.probe = torch.linalg.solve(normal, design.T @ F.one_hot(labels, 10).double()).float()

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(self.last_features(images), (0, 1), value=1.0) @ self.probe


def new_sit() -> SiTTransformer2DModel:
    return SiTTransformer2DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=1,
        hidden_size=64,
        num_layers=4,
        num_attention_heads=4,
        num_classes=10,
        learn_sigma=False,
    )


def resized(images: Tensor) -> Tensor:
    """Resizes uint8 images (B, 28, 28) to (B, 1, 16, 16), antialiased."""
    parts = (
        F.interpolate(part[:, None].float(), size=SIZE, mode="bilinear", antialias=True) for part in images.split(5000)
    )
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


@cache
@torch.no_grad()
def judge(folder: Path) -> tuple[Tensor, Tensor, Digits]:
    """Images, labels and what judges generators, without a generator yet: the same for all seeds."""
    data = np.load(folder / "mnist_70k.npz")
    images, labels = resized(torch.from_numpy(data["train_images"])), torch.from_numpy(data["train_labels"]).long()
    lenet = LeNet(torch.load(folder / "lenet_mnist.pth", weights_only=True))
    mobilenet = MobileNet(dict(np.load(folder / "mobilenet_v1_1.0_224_trunc_pw12.npz")))
    spaces: dict[str, Callable[..., Tensor]] = {
        "last": lenet.last_features,
        "middle": lenet.middle_features,
        "pixels": pixel_features,
        "asked": JointFeatures(lenet.probabilities, num_classes=10, scale=1),
    }
    real = {
        name: FeatureStatistics.from_features(extract_features(extract, images, labels))
        for name, extract in spaces.items()
    }
    features = extract_features(mobilenet.last_features, images[:NUM_HELDOUT])
    mobilenet.fit_probe(features, labels[:NUM_HELDOUT])
    digits = Digits(Path(), images, spaces, real, mobilenet, FeatureStatistics.from_features(features), {})
    return images, labels, digits


def prepare(cache_folder: Path, folder: Path, seed: int) -> Digits:
    """Reads a seed's generator from `cache_folder`, or trains it."""
    images, labels, digits = judge(folder)
    base_path = cache_folder / f"mnist{SIZE}-{seed}-{PRETRAINING_STEPS}"
    if not base_path.is_dir():
        model = train_sit(new_sit, images, labels, seed, PRETRAINING_STEPS)
        SiTPipeline(model).save_pretrained(base_path)
    return replace(digits, base_path=base_path)
