# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""SiT as diffusers' own `DiTPipeline` or `DiTTransformer2DModel`, for code that knows those and not this library."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMapEulerDiscreteScheduler
from torch import Tensor

from ..models.sit import SiTTransformer2DModel
from ..pipelines.sit import SiTPipeline

# diffusers' clock: 0 at data, this at noise
NUM_TRAIN_TIMESTEPS = 1000
# DiTPipeline's, whatever the number of classes
NULL_CLASS = 1000


def to_diffusers_pipeline(pipeline: SiTPipeline, id2label: Mapping[int, str] | None = None) -> DiTPipeline:
    """
    A [`~diffusers.DiTPipeline`] that makes the images of [`SiTPipeline`]'s ODE under Euler, of as many steps, from the
    same noise. `save_pretrained` writes a folder that `DiTPipeline.from_pretrained` loads.

    Of diffusers' schedulers for velocities `FlowMapEulerDiscreteScheduler` is the one that `DiTPipeline` can call and
    that takes even steps from 1 to 0 without rounding their times. SiT's SDE is not among its samplers.

    `DiTPipeline` guides by 4.0 unless `guidance_scale=1.0` says otherwise, on all channels, towards what it takes for
    the null class, 1000: with another number of classes only `guidance_scale=1.0` works.

    Args:
        pipeline ([`SiTPipeline`]): with a VAE, which is shared; the network is copied.
        id2label (`dict[int, str]`, *optional*): names of classes, for `DiTPipeline.get_label_ids`; commas separate
            several names of one.

    Raises:
        ValueError: there is no VAE; class 1000 is one of more; a name of no class; as in [`to_diffusers_dit`].
    """
    config = pipeline.transformer.config
    if pipeline.vae is None:
        raise ValueError("the pipeline has no VAE, and DiTPipeline always has one: load it with vae=….")
    if config.num_classes > NULL_CLASS:
        raise ValueError(
            f"num_classes={config.num_classes}: DiTPipeline would guide away from class {NULL_CLASS}, which is one of "
            "them; export the network alone with to_diffusers_dit."
        )
    unknown = [label for label in id2label or {} if not 0 <= label < config.num_classes]
    if unknown:
        raise ValueError(f"id2label names class {unknown[0]}: classes go from 0 to {config.num_classes - 1}.")
    exported = DiTPipeline(
        to_diffusers_dit(pipeline.transformer), pipeline.vae, FlowMapEulerDiscreteScheduler(), id2label=id2label
    )
    if id2label is not None:  # which DiTPipeline takes from a saved folder but does not write to it
        exported.register_to_config(id2label={str(label): name for label, name in id2label.items()})
    return exported


def to_diffusers_dit(model: SiTTransformer2DModel) -> DiTTransformer2DModel:
    """
    The same function of sample, time and label, in float32 to rounding, as a network of diffusers.

    It takes diffusers' times and gives diffusers' velocity, as `FlowMatchEulerDiscreteScheduler` has them: `timestep`
    in [0, 1000] with noise at 1000, `x_noise - x_data` as output, where SiT's own clock runs from noise at 0 to data
    at 1. Times need not be whole.

    diffusers embeds a time in `cos` and `sin` of other frequencies than SiT, `10000^(-k/127)` for SiT's
    `10000^(-k/128)`. SiT's embedding of a time in [0, 1] is nevertheless a linear map of diffusers', which goes into
    the first layer of the embedder: see [`~conversion.diffusers_dit.timestep_map`]. Every block has a copy of the
    embedders, as diffusers has it: SiT-XL/2 has 749.8 million parameters in place of 675.1. Training would let the
    copies drift apart: train SiT, and export it.

    Args:
        model ([`SiTTransformer2DModel`]): whose weights are copied, in their dtype.

    Returns:
        [`~diffusers.DiTTransformer2DModel`]: in evaluation mode. A learned sigma stays in the second half of its
        output channels, unused.

    Raises:
        ValueError: what diffusers' class cannot be: no null class, an MLP of another width than four times the
            network's, or position embeddings other than the fixed ones.
    """
    config = model.config
    if config.class_dropout_prob == 0:
        raise ValueError("the model has no null class, and diffusers' DiT always has one: it cannot be exported.")
    if config.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio={config.mlp_ratio}: diffusers' DiT always has 4, so it cannot be exported.")
    dtype = model.dtype
    exported = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    positions: Any = exported.pos_embed.pos_embed
    error = (positions - model.pos_embed.float().cpu()).abs().max().item()
    if not error < (1e-5 if dtype == torch.float32 else 1e-2):  # diffusers computes them anew in float64
        raise ValueError(
            f"the model's position embeddings are {error:.1e} off the fixed ones, which diffusers' DiT does not save: "
            "it cannot be exported."
        )
    exported.load_state_dict(_renamed(model))
    exported = exported.to(model.device).eval()
    return exported if dtype == torch.float32 else exported.to(dtype)


@torch.no_grad()
def _renamed(model: SiTTransformer2DModel) -> dict[str, Tensor]:
    """diffusers' state dict, float32."""
    weights = {name: value.float().cpu() for name, value in model.state_dict().items()}
    renamed: dict[str, Tensor] = {}

    def copy(source: str, *targets: str) -> None:
        for kind in ("weight", "bias"):
            parts = weights[f"{source}.{kind}"].chunk(len(targets))
            renamed.update({f"{target}.{kind}": part for target, part in zip(targets, parts, strict=True)})

    copy("x_embedder.proj", "pos_embed.proj")
    matrix = timestep_map()  # (257, 256)
    first = weights["t_embedder.mlp.0.weight"].double() @ matrix.T  # (width, 257)
    for i in range(model.config.num_layers):
        block, embedder = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
        attention = f"{block}.attn1"
        copy(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
        copy(f"blocks.{i}.attn.qkv", f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
        copy(f"blocks.{i}.attn.proj", f"{attention}.to_out.0")
        copy(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        copy(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        copy("t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2")
        renamed[f"{embedder}.timestep_embedder.linear_1.weight"] = first[:, :-1].float()
        renamed[f"{embedder}.timestep_embedder.linear_1.bias"] = weights["t_embedder.mlp.0.bias"] + first[:, -1]
        renamed[f"{embedder}.class_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"]
    copy("final_layer.adaLN_modulation.1", "proj_out_1")
    for kind in ("weight", "bias"):
        renamed[f"proj_out_2.{kind}"] = -weights[f"final_layer.linear.{kind}"]  # the other direction of time
    return renamed


def timestep_map(half: int = 128) -> Tensor:
    """
    What SiT's embedding of `1 - τ/1000` is of diffusers' embedding of `τ` in [0, 1000] and a constant.

    On the unit interval, `cos` and `sin` of SiT's frequencies, at most 1, are smooth functions that a few of
    diffusers' span to the last digits, those of at most 1.5/1000 a step; the map is the least-squares one of smallest
    norm. Its columns' absolute sums stay below 3, so that in float32 it adds no more than rounding.

    Returns:
        `torch.Tensor` of shape `(2 half + 1, 2 half)`, float64; the constant is last.
    """
    steps = torch.arange(half, dtype=torch.float32)  # frequencies as both networks round them
    ours = torch.exp(-math.log(10000) * steps / half).double()
    theirs = torch.exp(-math.log(10000) * steps / (half - 1)).double() * NUM_TRAIN_TIMESTEPS
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    wanted = torch.cat([((1 - times) * ours).cos(), ((1 - times) * ours).sin()], dim=1)
    known = torch.cat([(times * theirs).cos(), (times * theirs).sin(), torch.ones_like(times)], dim=1)
    used = torch.cat([(theirs <= 1.5).repeat(2), torch.tensor([True])]).nonzero().flatten()
    matrix = torch.zeros(2 * half + 1, 2 * half, dtype=torch.float64)
    matrix[used] = torch.linalg.lstsq(known[:, used], wanted, rcond=1e-12, driver="gelsd").solution
    return matrix
