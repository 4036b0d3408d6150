# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The Inception-v3 of the Fréchet inception distance: Google's frozen graph of 2015-12-05, as pure PyTorch.

Where it departs from later Inception-v3 networks, the torchvision one among them: 1008 logits; average pooling that
leaves padding out of the mean; a maximum in place of the average in the last block; TensorFlow 1's resize. All
published FIDs are distances in the features of this network (arXiv 1706.08500, section 4).
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preprocessing import full_precision, resize_pillow, resize_tensorflow, to_rgb
from .weights import find_weights, read_tensors

FID_WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
# of that file, and of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, which is the same
FID_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

INPUT_SIZE = 299
RESIZES = ("tensorflow", "pytorch", "clean")
DIMENSIONS = {"pool3": 2048, "spatial": 7 * 17 * 17, "logits": 1008, "logits_unbiased": 1008}

# A convolution is its name, channels, kernel, and optionally stride and padding; padding keeps the size by default,
# and is none with stride 2. Convolutions in a list follow each other, a tuple at its end runs side by side.
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


# What a block concatenates, under torchvision's names. The order of the branches is also that of the frozen graph,
# whose names for the blocks are mixed, mixed_1, … mixed_10, and for the branches conv, tower, tower_1, tower_2.
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


class StoredNormalization(nn.Module):
    """Batch normalization by stored statistics, in training as in evaluation mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class ConvolutionBlock(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int | tuple, stride: int = 1, padding: int = -1):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding < 0:
            pads = (height // 2, width // 2) if stride == 1 else (0, 0)
        else:
            pads = (padding, padding)
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, pads, bias=False)
        self.bn = StoredNormalization(channels)

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
                parallel = stage if isinstance(stage[0], tuple) else (stage,)
                if isinstance(stage, str):
                    names.append(stage)
                    continue
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
    The FID network, frozen. It computes in float32 without autocast or TF32, whatever surrounds it; images carry
    gradients through it when they are floating-point.

    Args:
        resize (`str`, *optional*, defaults to `"tensorflow"`):
            how images come to 299x299, and with it how they are scaled. Each is one of the literature's:
            `"tensorflow"`: the graph's own resize, then `(x - 128) / 128`; the original FID, ADM's evaluator,
            torch-fidelity and NVIDIA's networks. `"pytorch"`: `F.interpolate` of `x / 255` with half-pixel centres,
            then `2 x - 1`; pytorch-fid. `"clean"`: Pillow's bicubic, then `(x - 128) / 128`; clean-fid. Distances
            with different resizes are not comparable.
        output (`str`, *optional*, defaults to `"pool3"`):
            what a call returns: `"pool3"`, 2048 features, of FID, KID, precision and recall; `"spatial"`, 2023
            features, of sFID; `"logits"` or `"logits_unbiased"`, 1008, of the Inception Score (published scores are
            of the latter).

    Attributes:
        name (`str`), resize (`str`), dimension (`int`): what to record with statistics of these features.

    Example:

    ```python
    >>> inception = load_inception()
    >>> inception(images).shape  # (B, 3, H, W) uint8
    torch.Size([B, 2048])
    ```
    """

    def __init__(self, resize: str = "tensorflow", output: str = "pool3"):
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize={resize!r} is unknown: choose one of {', '.join(map(repr, RESIZES))}.")
        if output not in DIMENSIONS:
            raise ValueError(f"output={output!r} is unknown: choose one of {', '.join(map(repr, DIMENSIONS))}.")
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

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)` in [0, 255] to the network's input `(B, 3, 299, 299)`."""
        images = to_rgb(images, self.fc.weight.dtype)
        if self.resize == "pytorch":
            size = (INPUT_SIZE, INPUT_SIZE)
            return 2 * F.interpolate(images / 255, size=size, mode="bilinear", align_corners=False) - 1
        if self.resize == "clean":
            return (resize_pillow(images, INPUT_SIZE, eight_bit=False).clamp(0, 255) - 128) / 128
        return (resize_tensorflow(images, INPUT_SIZE) - 128) / 128

    def activations(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and output of each layer, one after the other: convolutions, pools and blocks, then `"pool3"`."""
        x = self.prepare(images)
        for stage in STEM:
            name = stage if isinstance(stage, str) else stage[0]
            x = POOLS[name](x) if name in POOLS else self.get_submodule(name)(x)
            yield name, x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            yield name, x
        yield "pool3", F.adaptive_avg_pool2d(x, 1).flatten(1)

    def outputs(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """
        Several outputs of one pass.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 1, H, W)`): uint8, or floating-point in [0, 255].
            names (`list[str]`): of `"pool3"`, `"spatial"`, `"logits"`, `"logits_unbiased"`.

        Returns:
            `dict[str, torch.Tensor]`: `(B, d)` each. `"spatial"` is ADM's `mixed_6/conv:0`, first seven channels:
            position by position, as ADM's evaluator flattens it.
        """
        found: dict[str, Tensor] = {}
        with full_precision(images.device):
            for layer, x in self.activations(images):
                if layer == "Mixed_6d":  # its first branch is the graph's mixed_6/conv
                    found["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
                    if set(names) == {"spatial"}:
                        return found
                elif layer == "pool3":
                    found["pool3"] = x
            found["logits_unbiased"] = F.linear(found["pool3"], self.fc.weight)
            found["logits"] = found["logits_unbiased"] + self.fc.bias
        return {name: found[name] for name in names}

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, d)` of `images`, as `outputs`."""
        return self.outputs(images, (self.output,))[self.output]


def nvidia_names() -> dict[str, str]:
    """
    Names of the convolutions in NVIDIA's `inception-2015-12-05.pt`, by ours: `layers.mixed_4.tower.conv_1` for
    `Mixed_6b.branch7x7_2`. They are the frozen graph's, where the branches stand in the same order.
    """
    stem = [stage[0] for stage in STEM if not isinstance(stage, str)]
    names = {ours: "layers.conv" + (f"_{i}" if i else "") for i, ours in enumerate(stem)}
    for i, (block, chains) in enumerate(BLOCKS.items()):
        towers = iter(("tower", "tower_1", "tower_2"))
        forked, prefix = block in ("Mixed_7b", "Mixed_7c"), f"{block}."
        parent = f"layers.mixed_{i}." if i else "layers.mixed."
        for chain in chains:
            stages = [stage for stage in chain if not isinstance(stage, str)]
            if len(chain) == 1 and stages:
                names[prefix + stages[0][0]] = f"{parent}conv"
                continue
            tower = next(towers) + ("_" if forked else ".")
            for j, stage in enumerate(stages):
                parallel = stage if isinstance(stage[0], tuple) else (stage,)
                inner = "mixed_conv" if len(parallel) > 1 else "conv"
                for k, (ours, *_) in enumerate(parallel):
                    number = k if len(parallel) > 1 else j
                    names[prefix + ours] = f"{parent}{tower}{inner}" + (f"_{number}" if number else "")
    return names


def from_nvidia(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of this network from NVIDIA's, whose normalization has no scale, the graph's being all ones."""
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    ours = {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    for name, theirs in nvidia_names().items():
        ours |= {f"{theirs}.{part}": f"{name}.{mine}" for part, mine in parts.items()}
    state = {ours.get(name, name): value for name, value in tensors.items()}
    for name in nvidia_names():
        if f"{name}.bn.bias" in state:
            state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
    return state


def check_state(state: Mapping[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """
    `state` without counts of training batches, when its names and shapes are those of `network`.

    Raises:
        ValueError: tensors are missing, unknown, misshapen, not float32 or not finite; it names them.
    """
    expected = network.state_dict()
    given = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    faults = {
        "are missing": sorted(expected.keys() - given.keys()),
        "are unknown": sorted(given.keys() - expected.keys()),
        "have another shape": [
            f"{name} {tuple(given[name].shape)}, not {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
        "are not float32": [name for name in expected if name in given and given[name].dtype != torch.float32],
        "are not finite": [name for name in expected if name in given and not given[name].isfinite().all()],
    }
    if any(faults.values()):
        said = [
            f"{len(n)} {what} ({', '.join(n[:4])}{', …' if len(n) > 4 else ''})" for what, n in faults.items() if n
        ]
        hint = ""
        if any(name.startswith("AuxLogits") for name in given):
            hint = " It looks like torchvision's Inception-v3, which is another network than FID's."
        raise ValueError(f"{source} does not hold the FID Inception-v3: of its tensors {'; '.join(said)}.{hint}")
    return given


def load_inception(
    source: str | os.PathLike | None = None,
    *,
    sha256: str | None = None,
    resize: str = "tensorflow",
    output: str = "pool3",
    device: torch.device | str | None = None,
) -> InceptionV3:
    """
    The FID network with its weights.

    Args:
        source (`str` or path, *optional*):
            weights, as [`~metrics.find_weights`] takes them: a local file, `"org/repo:file"` on the Hub, or a URL. By
            default pytorch-fid's release, which is downloaded once to `$TORCH_HOME/hub/checkpoints`, where pytorch-fid
            looks for it too. Read are pytorch-fid's and torch-fidelity's `.pth`, NVIDIA's TorchScript
            `inception-2015-12-05.pt` (its code is not run) and OpenAI's state dict of that name, and `.safetensors`
            of `InceptionV3().state_dict()`.
        sha256 (`str`, *optional*): digest the file must have; required with a URL of one's own.
        resize, output (`str`, *optional*): as in [`InceptionV3`].
        device (`torch.device`, *optional*): where to put it.

    Raises:
        FileNotFoundError, ConnectionError: there are no weights, and where they would be looked for.
        ValueError: another digest, missing or unknown tensors, wrong shapes, or a pickle that would run code.
    """
    if source is None:
        source, sha256 = FID_WEIGHTS_URL, sha256 or FID_WEIGHTS_SHA256
    path = find_weights(source, sha256)
    if path.suffix == ".pkl":
        raise ValueError(
            f"{path} is a pickle that carries source code and is not read: its weights are those of {FID_WEIGHTS_URL}."
        )
    with torch.device("meta"):  # without drawing weights that are replaced at once
        network = InceptionV3(resize, output)
    state = read_tensors(path)
    if "output.weight" in state:
        state = from_nvidia(state)
    state = check_state(state, network, str(path))
    network.to_empty(device="cpu").load_state_dict(state)
    return network.to(device or "cpu")
