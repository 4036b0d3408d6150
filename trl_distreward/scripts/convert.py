# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Convert original checkpoints to folders that load as pipelines. Nothing in a checkpoint is executed.

    trl-distreward convert sit SiT-XL-2-256x256.pt sit-xl/
    trl-distreward convert edm2 edm2-img512-xs-2147483-0.135.pkl edm2-xs/
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ..conversion.edm2 import build_edm2, read_original_edm2
from ..conversion.hub import push_with_code
from ..conversion.sit import load_original_sit
from ..pipelines.edm2 import EDM2Pipeline
from ..pipelines.sit import SiTPipeline
from ..saving import saved_whole, without_machine
from . import cli

SIT_VAE = "stabilityai/sd-vae-ft-ema"
PAPERS = {"sit": "2401.08740", "edm2": "2312.02696"}
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {name}

Converted by `trl-distreward convert {family}` from `{source}`, whose licence applies. Paper:
[arXiv {paper}](https://huggingface.co/papers/{paper}).

```python
from diffusers import AutoencoderKL, DiffusionPipeline
from trl_distreward import load_pipeline

pipeline = load_pipeline("{name}"{vae})
# on the Hub, with a copy of the code and without trl-distreward:
# pipeline = DiffusionPipeline.from_pretrained("{name}"{vae}, trust_remote_code=True)
images = pipeline(class_labels=[0, 1]).images
```
"""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("convert", __doc__)
    families = parser.add_subparsers(dest="family", required=True)
    sit = families.add_parser("sit", help="SiT's .pt: a state dict or a training checkpoint")
    edm2 = families.add_parser("edm2", help="EDM2's .pkl")
    for add in (sit.add_argument, edm2.add_argument):
        add("checkpoint", type=Path, help="original file")
        add("output", type=Path, help="folder to write; must not exist, or be empty")
        add("--vae", help="folder or Hub id of the VAE; by default the one of the original network")
        add("--no-embed-vae", action="store_true", help="name the VAE in the model card instead of copying it")
        add("--dtype", choices=cli.DTYPES, default="float32", help="dtype of the network")
        add("--push-to-hub", metavar="REPO", help="also push to this Hub id, with the code of the classes")
        add("--private", action="store_true", help="create that repository as private")
    sit.add_argument("--num-attention-heads", type=int, help="number of heads, if the size is not a published one")
    sit.add_argument("--num-classes", type=int, help="default: rows of the label embedding, less one")
    sit.add_argument("--pixels", action="store_true", help="the network makes pixels, without a VAE")
    edm2.add_argument("--guider", type=Path, help="snapshot of the network that guidance leads away from")
    return parser


def convert(arguments: argparse.Namespace) -> tuple[DiffusionPipeline, str | None]:
    """Returns the pipeline and the name of its VAE."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.family == "sit":
        transformer = load_original_sit(arguments.checkpoint, arguments.num_attention_heads, arguments.num_classes)
        vae = None if arguments.pixels else arguments.vae or SIT_VAE
        return SiTPipeline(transformer.to(dtype), load_vae(arguments, vae)), vae
    original = read_original_edm2(arguments.checkpoint)
    guider = None if arguments.guider is None else build_edm2(read_original_edm2(arguments.guider), dtype)
    vae = None if original.vae is None else arguments.vae or original.vae
    return EDM2Pipeline(build_edm2(original, dtype), guider, load_vae(arguments, vae), **original.latents), vae


def load_vae(arguments: argparse.Namespace, name: str | None) -> AutoencoderKL | None:
    return None if name is None or arguments.no_embed_vae else AutoencoderKL.from_pretrained(name)


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    output, family, repo = arguments.output, arguments.family, arguments.push_to_hub
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: name a folder that does not exist yet.")
    pipeline, vae = convert(arguments)
    load = ', vae=AutoencoderKL.from_pretrained("{}")' if vae is not None and pipeline.vae is None else ""
    if load:
        print(f"The pipeline has no VAE: load it with {load[2:].format(vae)}.")
    name, load = repo or output.resolve().name, load.format(without_machine(vae))
    about = {"name": name, "family": family, "source": arguments.checkpoint.name, "paper": PAPERS[family]}
    with saved_whole(output) as partial:
        pipeline.save_pretrained(partial)
        (partial / "README.md").write_text(CARD.format(vae=load, **about))
    print(f"{output}: {type(pipeline).__name__}")
    if repo:
        print(push_with_code(pipeline, output, repo, private=arguments.private or None))
