# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The Inception-v3 of the Fréchet inception distance: Google's frozen graph of 2015-12-05, as pure PyTorch.

It differs from later Inception-v3 networks, torchvision's among them: 1008 logits; average pooling that leaves padding
out of the mean; a maximum in place of the average in the last block; TensorFlow 1's resize. Published FIDs are
distances in its features (arXiv 1706.08500, section 4).
"""

import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import check_archive
from .precision import full_precision
from .preprocessing import resize_pillow, resize_tensorflow, to_rgb

# the same file as torch-fidelity's weights-inception-2015-12-05-6726825d.pth
FID_WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)

INPUT_SIZE = 299
RESIZES = ("tensorflow", "pytorch", "clean")
DIMENSIONS = {"pool3": 2048, "spatial": 7 * 17 * 17, "logits": 1008, "logits_unbiased": 1008}

# A convolution is its name, channels, kernel, and optionally stride and padding. By default padding keeps the size,
# and is 0 with stride 2. Convolutions in a list follow each other; a tuple at its end runs side by side.
STEM = (
    ("Conv2d_1a_3x3", 32, 3, 2),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 64, 3),
    "pool",
    ("Conv2d_3b_1x1", 80, 1),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
    "pool",
)


def _block_a(pool_channels: int) -> list[list]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pool_channels, 1)],
    ]


def _block_c(width: int) -> list[list]:
    double = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [(f"branch7x7dbl_{i}", *convolution) for i, convolution in enumerate(double, start=1)],
        ["average", ("branch_pool", 192, 1)],
    ]


def _block_e(pool: str) -> list[list]:
    def fork(name: str) -> tuple:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1)],
    ]


# The branches that a block concatenates, in the frozen graph's order, under torchvision's names.
BLOCKS: dict[str, list[list]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["pool"],
    ],
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["pool"],
    ],
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),  # an average in every later Inception-v3
}
POOLS = {
    "pool": nn.MaxPool2d(3, stride=2),
    "average": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "maximum": nn.MaxPool2d(3, stride=1, padding=1),
}


class ConvolutionBlock(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int | tuple, stride: int = 1, padding: int = -1):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (height // 2, width // 2) if stride == 1 and padding < 0 else (max(padding, 0),) * 2
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, pads, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Chains of convolutions and poolings side by side, concatenated over channels."""

    def __init__(self, in_channels: int, chains: Sequence[Sequence]):
        super().__init__()
        self.chains: list[list] = []
        self.channels = 0
        for chain in chains:
            channels = in_channels
            names: list = []
            for stage in chain:
                if isinstance(stage, str):
                    names.append(stage)
                    continue
                parallel = stage if isinstance(stage[0], tuple) else (stage,)
                for name, *shape in parallel:
                    self.add_module(name, ConvolutionBlock(channels, *shape))
                names.append([name for name, *_ in parallel])
                channels = sum(convolution[1] for convolution in parallel)
            self.chains.append(names)
            self.channels += channels

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for chain in self.chains:
            y = [x]
            for stage in chain:
                y = [POOLS[stage](y[0])] if isinstance(stage, str) else [self.get_submodule(n)(y[0]) for n in stage]
            ends += y
        return torch.cat(ends, dim=1)


class InceptionV3(nn.Module):
    """
    The FID network, frozen, always in float32 without autocast or TF32; floating-point images carry gradients.

    Args:
        resize (`str`, *optional*, defaults to `"tensorflow"`): resize to 299x299 and scaling, which distances must
            share. `"tensorflow"`: the graph's own resize, then `(x - 128) / 128`, as the original FID, ADM's
            evaluator, torch-fidelity and NVIDIA's networks. `"pytorch"`: `F.interpolate` of `x / 255` with half-pixel
            centres, then `2 x - 1`, as pytorch-fid. `"clean"`: Pillow's bicubic, then `(x - 128) / 128`, as clean-fid.
        output (`str`, *optional*, defaults to `"pool3"`): result of a call: `"pool3"`, 2048 features for FID, KID,
            precision and recall; `"spatial"`, 2023 features for sFID; `"logits"` or `"logits_unbiased"`, 1008 logits
            for the Inception Score (published scores use the latter).
    """

    def __init__(self, resize: str = "tensorflow", output: str = "pool3"):
        super().__init__()
        for option, value, known in (("resize", resize, RESIZES), ("output", output, DIMENSIONS)):
            if value not in known:
                raise ValueError(f"{option}={value!r} is unknown: choose one of {', '.join(map(repr, known))}.")
        self.resize, self.output = resize, output
        self.name = "inception" if output == "pool3" else f"inception-{output}"
        self.dimension = DIMENSIONS[output]
        channels = 3
        for stage in STEM:
            if not isinstance(stage, str):
                self.add_module(stage[0], ConvolutionBlock(channels, *stage[1:]))
                channels = stage[1]
        for name, chains in BLOCKS.items():
            block = Branches(channels, chains)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, DIMENSIONS["logits"])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stays in evaluation mode: normalization is by the stored statistics."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)` in [0, 255] to the network's input `(B, 3, 299, 299)`."""
        images = to_rgb(images, self.fc.weight.dtype)
        if self.resize == "pytorch":
            return 2 * F.interpolate(images / 255, (INPUT_SIZE,) * 2, mode="bilinear", align_corners=False) - 1
        if self.resize == "clean":
            return (resize_pillow(images, INPUT_SIZE, eight_bit=False).clamp(0, 255) - 128) / 128
        return (resize_tensorflow(images, INPUT_SIZE) - 128) / 128

    def activations(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields name and output of each convolution, pool and block, then of `"pool3"`."""
        x = self.prepare(images)
        for stage in STEM:
            name = stage if isinstance(stage, str) else stage[0]
            x = POOLS[name](x) if name in POOLS else self.get_submodule(name)(x)
            yield name, x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            yield name, x
        yield "pool3", F.adaptive_avg_pool2d(x, 1).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """Unbiased logits `(N, 1008)` of the output `"pool3"` `(N, 2048)`, for the Inception Score."""
        with full_precision():
            return F.linear(features.to(self.fc.weight.device), self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        """The `output` `(B, d)` of images `(B, 3 or 1, H, W)`, uint8 or float in [0, 255]."""
        with full_precision():
            for layer, x in self.activations(images):
                # its first branch is mixed_6/conv:0, of which ADM's evaluator takes 7 channels
                if layer == "Mixed_6d" and self.output == "spatial":
                    return x[:, :7].permute(0, 2, 3, 1).flatten(1)
        if self.output == "pool3":
            return x
        return self.logits(x) + (self.fc.bias if self.output == "logits" else 0)


def load_inception(
    source: str | os.PathLike | None = None, *, resize: str = "tensorflow", output: str = "pool3"
) -> InceptionV3:
    """
    Loads the FID network with the `resize` and `output` of [`InceptionV3`] from a file, or one on the Hub,
    `"org/repo:file"`: pytorch-fid's or torch-fidelity's `.pth`, or `.safetensors` of `InceptionV3().state_dict()`. By
    default it is pytorch-fid's release, downloaded once to where pytorch-fid looks for it too.
    """
    with torch.device("meta"):  # without drawing weights that are replaced at once
        network = InceptionV3(resize, output)
    try:
        state = {name: value for name, value in _read_weights(source).items() if "num_batches_tracked" not in name}
        network.load_state_dict(state, assign=True)
    except OSError:
        raise
    except Exception as error:  # a malformed pickle can raise anything
        found = f"{source or FID_WEIGHTS_URL} does not hold the weights of the FID Inception-v3"
        raise ValueError(f"{found} (torchvision's is another network): {error}") from error
    return network


def _read_weights(source: str | os.PathLike | None) -> dict[str, Tensor]:
    if source is None:
        try:
            return torch.hub.load_state_dict_from_url(
                FID_WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True
            )
        except OSError as error:
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise OSError(f"{FID_WEIGHTS_URL} cannot be downloaded ({error}): put that file into {folder}.") from error
    repo, _, name = os.fspath(source).partition(":")
    path = hf_hub_download(repo, name) if name and not os.path.exists(source) else source
    check_archive(path)
    return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
