# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Compares Inception and the resizing of images with the reference implementations, with the same random weights.

    pip install torchvision pytorch-fid torch-fidelity clean-fid
    python benchmarks/feature_parity.py

Writes feature_parity.json next to this file. No weights are downloaded.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import rounded, write_table
from torch import Tensor, nn

from trl_distreward import InceptionV3
from trl_distreward.metrics.preprocessing import resize_pillow, resize_tensorflow

GENERATOR = torch.Generator().manual_seed(0)


def noise(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=GENERATOR).to(torch.uint8)


def smooth(count: int, size: int) -> Tensor:
    coarse = torch.rand(count, 3, 9, 9, generator=GENERATOR) * 255
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


IMAGES = {
    "noise 64": noise(3, 64),
    "smooth 256": smooth(3, 256),
    "noise 299": noise(1, 299),
    "noise 512": noise(1, 512),
}


def randomize(module: nn.Module) -> nn.Module:
    """Draws random weights that keep activations of order one through many layers."""
    for name, tensor in module.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=GENERATOR)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=GENERATOR))
        elif name.endswith("bn.weight"):
            tensor.copy_(0.8 + 0.4 * torch.rand(tensor.shape, generator=GENERATOR))
        elif tensor.ndim == 4:
            tensor.copy_(drawn * (2 / tensor[0].numel()) ** 0.5)
        elif tensor.ndim == 2:
            tensor.copy_(drawn / tensor.shape[1] ** 0.5)
        else:
            tensor.copy_(0.3 * drawn)
    return module.eval()


def watch(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name in names:
        module.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    return seen


class Table:
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, original: str, what: str, ours: Tensor, theirs: Tensor) -> None:
        difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        row = {"original": original, "what": what, "max_abs_difference": difference, "max_abs": scale}
        self.rows.append(rounded(row, 4))
        print(f"{original:20} {what:45} {difference:10.3g} of {scale:.4g}", flush=True)

    def worst(self, original: str, what: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.add(original, what, *max(pairs, key=lambda pair: (pair[0] - pair[1]).abs().max().item()))


def compare_torch_fidelity(table: Table, path: Path, network: InceptionV3) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    outputs = {"2048": "pool3", "logits_unbiased": "logits_unbiased", "logits": "logits"}
    original = FeatureExtractorInceptionV3("inception-v3-compat", list(outputs), str(path))
    convolutions = [name.removesuffix(".conv") for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    layers = [*convolutions, *(name for name, _ in network.named_children() if name.startswith("Mixed"))]
    ours, theirs = watch(network, layers), watch(original, layers)
    for label, images in IMAGES.items():
        expected = original(images)
        found = {}
        for name in outputs.values():
            network.output = name
            found[name] = network(images)
        resized = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        table.add("torch-fidelity", f"resize, {label}", resize_tensorflow(images.float(), 299), resized)
        table.worst("torch-fidelity", f"{len(layers)} layers, {label}", [(ours[n], theirs[n]) for n in layers])
        for name, value in zip(outputs.values(), expected, strict=True):
            table.add("torch-fidelity", f"{name}, {label}", found[name], value)


def compare_pytorch_fid(table: Table, state: dict[str, Tensor], network: InceptionV3) -> None:
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *args, **kwargs: state
    original = inception.InceptionV3([0, 1, 2, 3]).eval()
    network.resize = "pytorch"
    for label, images in IMAGES.items():
        first, second, third, last = original(images.float() / 255)
        found = list(network.activations(images))
        pools = [x for name, x in found if name == "pool"]
        named = dict(found)
        pairs = [(pools[0], first), (pools[1], second), (named["Mixed_6e"], third)]
        table.worst("pytorch-fid", f"3 blocks, {label}", pairs)
        table.add("pytorch-fid", f"pool3, {label}", named["pool3"], last.flatten(1))


def compare_clean_fid(table: Table) -> None:
    from cleanfid.resize import build_resizer

    resizer = build_resizer("clean")
    for label, images in IMAGES.items():
        arrays = images.permute(0, 2, 3, 1).numpy()
        expected = torch.from_numpy(np.stack([resizer(a) for a in arrays])).permute(0, 3, 1, 2)
        ours = resize_pillow(images.float(), 299, eight_bit=False).clamp(0, 255)
        table.add("clean-fid", f"resize, {label}", ours, expected)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    table, network = Table(), randomize(InceptionV3())
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(network.state_dict(), Path(scratch) / "weights.pth")
        compare_torch_fidelity(table, Path(scratch) / "weights.pth", network)
    compare_pytorch_fid(table, network.state_dict(), network)
    compare_clean_fid(table)
    packages = ("torch", "pytorch-fid", "torch-fidelity", "clean-fid")
    write_table(arguments.output, table.rows, packages)


if __name__ == "__main__":
    main()
