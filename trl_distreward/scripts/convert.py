# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Converts original checkpoints to folders that load as pipelines. Nothing in a checkpoint is executed.

    trl-distreward convert sit SiT-XL-2-256x256.pt sit-xl/
    trl-distreward convert edm2 edm2-img512-xs-2147483-0.135.pkl edm2-xs/
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from ..conversion.edm2 import build_edm2, read_original_edm2
from ..conversion.hub import push_with_code
from ..conversion.sit import load_original_sit
from ..pipelines.edm2 import EDM2Pipeline
from ..pipelines.sit import SiTPipeline
from . import cli

SIT_VAE = "stabilityai/sd-vae-ft-ema"
PAPERS = {"sit": "2401.08740", "edm2": "2312.02696"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-distreward convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = parser.add_subparsers(dest="family", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("checkpoint", type=Path, help="original file")
    shared.add_argument("output", type=Path, help="folder to write; must not exist, or be empty")
    shared.add_argument("--vae", help="Hub id or folder of the VAE; by default the one the network was trained with")
    shared.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="of the network; the VAE keeps its own",
    )
    shared.add_argument("--push-to-hub", metavar="REPO", help="Hub id to push to, with the code of the classes")
    shared.add_argument("--private", action="store_true", help="create that repository as private")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument(
        "--no-embed-vae", action="store_true", help="name the VAE in the model card instead of copying it"
    )
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--num-attention-heads", type=int, help="for a network of none of the published sizes")
    sizes.add_argument("--num-classes", type=int, help="one less than the label embedding has rows by default")
    help_sit = "SiT's .pt: a state dict or a training checkpoint"
    sit = families.add_parser("sit", parents=[shared, named, sizes], help=help_sit)
    sit.add_argument("--pixels", action="store_true", help="the network's samples are images: there is no VAE")
    edm2 = families.add_parser("edm2", parents=[shared, named], help="EDM2's .pkl")
    edm2.add_argument("--guider", type=Path, help="snapshot of the network that guidance leads away from")
    return parser


def convert_sit(arguments: argparse.Namespace) -> tuple[DiffusionPipeline, str | None]:
    transformer = load_original_sit(arguments.checkpoint, arguments.num_attention_heads, arguments.num_classes)
    vae = None if arguments.pixels else arguments.vae or SIT_VAE
    pipeline = SiTPipeline(transformer.to(getattr(torch, arguments.dtype)), load_vae(arguments, vae))
    return pipeline, vae


def convert_edm2(arguments: argparse.Namespace) -> tuple[DiffusionPipeline, str | None]:
    dtype = getattr(torch, arguments.dtype)
    original = read_original_edm2(arguments.checkpoint)
    guider = None if arguments.guider is None else build_edm2(read_original_edm2(arguments.guider), dtype)
    vae = None if original.vae is None else arguments.vae or original.vae
    latents: dict[str, Any] = {}
    if original.vae is not None:
        latents = {"latents_scale": original.latents_scale, "latents_bias": original.latents_bias}
    return EDM2Pipeline(build_edm2(original, dtype), guider, load_vae(arguments, vae), **latents), vae


def load_vae(arguments: argparse.Namespace, name: str | None) -> AutoencoderKL | None:
    if name is None or arguments.no_embed_vae:
        return None
    return AutoencoderKL.from_pretrained(name)


def check_channels(network: Any, vae: AutoencoderKL, name: str | None) -> None:
    """Raises `ValueError` where the VAE of that name does not decode what the network makes."""
    made, decoded = network.config.in_channels, vae.config.latent_channels
    if made != decoded:
        raise ValueError(
            f"the network makes {made} channels and the VAE {name} decodes {decoded}: name the one it was trained "
            "with, or, of a network that makes pixels, none: --pixels."
        )


def build_card(arguments: argparse.Namespace, pipeline: DiffusionPipeline, vae: str | None) -> ModelCard:
    name, family = arguments.push_to_hub or str(arguments.output), arguments.family
    data = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation")
    head = f"""# {name.rstrip("/").split("/")[-1]}

Converted by `trl-distreward convert {family}` from `{arguments.checkpoint.name}`, whose licence applies. Paper:
[arXiv {PAPERS[family]}](https://huggingface.co/papers/{PAPERS[family]}).
"""
    body = own_usage(arguments, name, pipeline, vae)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{head}{body}")


def own_usage(arguments: argparse.Namespace, name: str, pipeline: DiffusionPipeline, vae: str | None) -> str:
    extra, autoencoder = "", ""
    if vae is not None and pipeline.vae is None:
        extra, autoencoder = f', vae=AutoencoderKL.from_pretrained("{vae}")', "from diffusers import AutoencoderKL\n"
    remote = f"""
Without trl-distreward, by the copy of its code in the repository:

```python
{autoencoder}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}"{extra}, trust_remote_code=True)
```
"""
    return f"""
```python
{autoencoder}from trl_distreward import load_pipeline

pipeline = load_pipeline("{name}"{extra})
images = pipeline(class_labels=[0, 1]).images
```
{remote if arguments.push_to_hub else ""}"""


def refuse_idle_options(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` where an option would be without effect."""
    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private is of the repository that --push-to-hub makes: give that, or leave it out.")
    of_vae = [name for name in ("vae", "no_embed_vae") if getattr(arguments, name, None)]
    if getattr(arguments, "pixels", False) and of_vae:
        option = of_vae[0].replace("_", "-")
        raise ValueError(f"--{option} is of a VAE, which a network of --pixels has not: leave one of them out.")


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    refuse_idle_options(arguments)
    if not arguments.output.name:
        raise ValueError(f"the output {str(arguments.output)!r} has no name of its own: name a folder.")
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        raise ValueError(f"{arguments.output} is not empty: name a folder that is not there yet.")
    pipeline, vae = {"sit": convert_sit, "edm2": convert_edm2}[arguments.family](arguments)
    network = pipeline.unet if arguments.family == "edm2" else pipeline.transformer
    if pipeline.vae is not None:
        check_channels(network, pipeline.vae, vae)
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    build_card(arguments, pipeline, vae).save(partial / "README.md")
    if arguments.output.is_dir():
        arguments.output.rmdir()
    os.replace(partial, arguments.output)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{arguments.output}: {type(pipeline).__name__} of {parameters:,} parameters")
    if pipeline.vae is None and vae is not None:
        print(f"It has no VAE: load it with vae=AutoencoderKL.from_pretrained({vae!r}).")
    if arguments.push_to_hub:
        print(push_with_code(pipeline, arguments.output, arguments.push_to_hub, private=arguments.private or None))


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.convert", main)
