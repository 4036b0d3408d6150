# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Compares the feature networks with the originals: the same random weights, the same images, layer by layer.

    pip install torchvision pytorch-fid torch-fidelity clean-fid
    git clone https://github.com/openai/consistency_models
    git clone https://github.com/facebookresearch/dinov2
    python benchmarks/feature_parity.py --consistency_models consistency_models --dinov2 dinov2

Writes feature_parity.json beside this file. No weights are downloaded.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trl_distreward import InceptionV3, load_feature_extractor
from trl_distreward.metrics.inception import BLOCKS, STEM
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
    """Random weights that keep activations of order one through many layers."""
    for name, tensor in module.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=GENERATOR)
        if name.endswith(("running_var", ".var")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=GENERATOR))
        elif name.endswith(("bn.weight", "norm.weight", "norm1.weight", "norm2.weight", "gamma")):
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
        self.rows.append({"original": original, "what": what, "max_abs_difference": difference, "max_abs": scale})
        print(f"{original:20} {what:45} {difference:10.3g} of {scale:.4g}", flush=True)

    def worst(self, original: str, what: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.add(original, what, *max(pairs, key=lambda pair: (pair[0] - pair[1]).abs().max().item()))


def compare_torch_fidelity(table: Table, path: Path, network: InceptionV3) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    outputs = {"2048": "pool3", "logits_unbiased": "logits_unbiased", "logits": "logits"}
    original = FeatureExtractorInceptionV3("inception-v3-compat", list(outputs), str(path))
    convolutions = [name.removesuffix(".conv") for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    # a first convolution of a branch, whose output a later one replaces, is compared by that later one
    layers = [*convolutions, *(name for name, _ in network.named_children() if name.startswith("Mixed"))]
    ours, theirs = watch(network, layers), watch(original, layers)
    for label, images in IMAGES.items():
        expected = original(images)
        found = network.outputs(images, list(outputs.values()))
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


def nvidia_names() -> dict[str, str]:
    """Names of convolutions in NVIDIA's network, by ours: `layers.mixed_4.tower.conv_1` for `Mixed_6b.branch7x7_2`."""
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


def from_nvidia(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of our network from NVIDIA's, whose normalization has no scale."""
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    ours = {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    for name, theirs in nvidia_names().items():
        ours |= {f"{theirs}.{part}": f"{name}.{mine}" for part, mine in parts.items()}
    state = {ours.get(name, name): value for name, value in tensors.items()}
    for name in nvidia_names():
        if f"{name}.bn.bias" in state:
            state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
    return state


def compare_openai(table: Table, folder: str) -> None:
    sys.path.insert(0, folder)
    from evaluations.inception_v3 import InceptionV3 as Original

    original = randomize(Original())
    network = InceptionV3()
    network.load_state_dict(from_nvidia(original.state_dict()))
    for label, images in IMAGES.items():
        features, spatial = original(images)
        found = network.outputs(images, ["pool3", "spatial"])
        table.add("OpenAI (NVIDIA)", f"pool3, {label}", found["pool3"], features)
        table.add("OpenAI (NVIDIA)", f"spatial, {label}", found["spatial"], spatial)
        # its resize goes through grid_sample, whose coordinates round differently: compared again after our resize
        prepared = network.prepare(images)
        hook = original.layers[0].register_forward_pre_hook(lambda module, inputs, prepared=prepared: (prepared,))
        features, spatial = original(images)
        hook.remove()
        table.add("OpenAI (NVIDIA)", f"pool3 behind our resize, {label}", found["pool3"], features)
        table.add("OpenAI (NVIDIA)", f"spatial behind our resize, {label}", found["spatial"], spatial)


def dinov2_weights(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """DINOv2's own names as transformers has them."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    renamed = {theirs: state[ours] for ours, theirs in names.items()}
    for block in range(blocks):
        ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
        for scale in (1, 2):
            renamed[f"{theirs}layer_scale{scale}.lambda1"] = state[f"{ours}ls{scale}.gamma"]
        for kind in ("weight", "bias"):
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{theirs}{part}.{kind}"] = state[f"{ours}{part}.{kind}"]
            renamed[f"{theirs}attention.o_proj.{kind}"] = state[f"{ours}attn.proj.{kind}"]
            for part, value in zip("qkv", state[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{theirs}attention.{part}_proj.{kind}"] = value
    return renamed


def compare_dinov2(table: Table, folder: str, blocks: int = 3) -> None:
    sys.path.insert(0, folder)
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer
    from transformers import Dinov2Config, Dinov2Model

    original = DinoVisionTransformer(
        img_size=518, patch_size=14, embed_dim=1024, depth=blocks, num_heads=16, init_values=1.0, block_chunks=0,
        interpolate_offset=0.1, block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
    )  # fmt: skip
    randomize(original)
    # position embeddings of trained networks are smooth
    grid = F.interpolate(torch.randn(1, 1024, 7, 7, generator=GENERATOR), size=(37, 37), mode="bicubic")
    original.pos_embed[:, 1:] = grid.flatten(2).transpose(1, 2)
    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=blocks, num_attention_heads=16, image_size=518, patch_size=14
    )
    plain = Dinov2Model(config).eval()
    plain.load_state_dict(dinov2_weights(original.state_dict(), blocks))
    with tempfile.TemporaryDirectory() as scratch:
        plain.save_pretrained(scratch)
        ours = load_feature_extractor("dinov2", source=scratch)
    for label, images in IMAGES.items():
        prepared = ours.prepare(images)
        expected = original(prepared)
        table.add("DINOv2", f"class token, {label}", ours(images), expected)
        alone = plain(pixel_values=prepared).last_hidden_state[:, 0]
        table.add("DINOv2", f"transformers without our positions, {label}", alone, expected)


def compare_pillow(table: Table) -> None:
    for label, images in IMAGES.items():
        for size in (224, 336):
            arrays = images.permute(0, 2, 3, 1).numpy()
            resized = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BICUBIC)) for a in arrays]
            expected = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()
            table.add("Pillow", f"resize to {size}, {label}", resize_pillow(images.float(), size), expected)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consistency_models", help="clone of OpenAI's repository")
    parser.add_argument("--dinov2", help="clone of the repository of DINOv2")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    table, network = Table(), randomize(InceptionV3())
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(network.state_dict(), Path(scratch) / "weights.pth")
        compare_torch_fidelity(table, Path(scratch) / "weights.pth", network)
    compare_pytorch_fid(table, network.state_dict(), network)
    compare_clean_fid(table)
    compare_pillow(table)
    if arguments.consistency_models:
        compare_openai(table, arguments.consistency_models)
    if arguments.dinov2:
        compare_dinov2(table, arguments.dinov2)
    packages = ("torch", "transformers", "pillow", "pytorch-fid", "torch-fidelity", "clean-fid")
    versions = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps({"versions": versions, "rows": table.rows}, indent=1)
    arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
