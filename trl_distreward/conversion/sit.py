# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Load SiT's published weights, and checkpoints of its training script (`.pt`), as [`SiTTransformer2DModel`]."""

import argparse
import math
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import check_archive
from ..models.sit import SIT_SIZES, SiTTransformer2DModel


def load_original_sit(
    path_or_state_dict: str | os.PathLike | Mapping[str, object],
    num_attention_heads: int | None = None,
    num_classes: int | None = None,
) -> SiTTransformer2DModel:
    """
    Loads the network of a SiT checkpoint, in evaluation mode and in the checkpoint's dtype. Nothing is executed.

    The configuration follows from the weights' shapes. A training checkpoint gives its average, `ema`.

    Args:
        path_or_state_dict (`str` or `dict`): the `.pt` file, or its content.
        num_attention_heads (`int`, *optional*):
            number of heads, which shapes do not tell; by default that of the published network with this size.
        num_classes (`int`, *optional*):
            number of classes; by default as the checkpoint's `args` say, or the embedding's rows less the null class.
    """
    given = isinstance(path_or_state_dict, Mapping)
    checkpoint: Any = path_or_state_dict if isinstance(path_or_state_dict, Mapping) else _read(path_or_state_dict)
    if isinstance(checkpoint, Mapping) and "ema" in checkpoint:
        if num_classes is None:
            num_classes = getattr(checkpoint.get("args"), "num_classes", None)
        checkpoint = checkpoint["ema"]
    tensors = isinstance(checkpoint, Mapping) and all(isinstance(value, Tensor) for value in checkpoint.values())
    if not tensors or not checkpoint:
        raise ValueError("the checkpoint is neither a state dict nor a training checkpoint with one under 'ema'.")
    with torch.device("meta"):  # no random weights that are thrown away
        model = SiTTransformer2DModel(**infer_sit_config(checkpoint, num_attention_heads, num_classes))
    # a state dict that was passed keeps its own tensors
    weights = {name: value.detach().clone() if given else value.detach() for name, value in checkpoint.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # lists the keys and shapes
        raise ValueError(f"the state dict is not SiT's: {error}") from error
    return model.eval()


def _read(path: str | os.PathLike) -> object:
    file = open(path, "rb")
    try:
        check_archive(path)
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{os.fspath(path)} is refused as a SiT checkpoint: it is damaged, or has more in it than tensors and "
            f"argparse.Namespace ({reason}). Nothing in it was executed."
        ) from error


def infer_sit_config(
    state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None, num_classes: int | None = None
) -> dict[str, int | float | bool]:
    """Infers the configuration of the [`SiTTransformer2DModel`] with these weights."""
    needed = ("x_embedder.proj", "final_layer.linear", "y_embedder.embedding_table", "blocks.0.mlp.fc1")
    missing = [name for name in ("pos_embed", *(f"{name}.weight" for name in needed)) if name not in state_dict]
    if missing:
        raise ValueError(f"the state dict lacks {missing[0]}: it is not SiT's.")
    patches, last, labels, fc1 = (state_dict[f"{name}.weight"] for name in needed)
    width, channels, patch, _ = patches.shape
    depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    if num_attention_heads is None:
        heads = {(size["num_layers"], size["hidden_size"]): size["num_attention_heads"] for size in SIT_SIZES.values()}
        if (depth, width) not in heads:
            size = f"{depth} layers of width {width} are not one of SiT's sizes ({', '.join(SIT_SIZES)})"
            raise ValueError(f"{size}, and shapes do not tell the number of heads: pass num_attention_heads.")
        num_attention_heads = heads[depth, width]
    classes = len(labels) - 1 if num_classes is None else num_classes
    if len(labels) - classes not in (0, 1):
        raise ValueError(f"num_classes={classes} does not fit an embedding of {len(labels)} rows.")
    outputs = len(last) // patch**2
    return {
        "sample_size": math.isqrt(state_dict["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "num_layers": depth,
        "num_attention_heads": num_attention_heads,
        "mlp_ratio": len(fc1) / width,
        "num_classes": classes,
        "class_dropout_prob": 0.1 if len(labels) > classes else 0.0,
        "learn_sigma": outputs == 2 * channels,
    }
