# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""SiT's published weights and the checkpoints of its training script (`.pt`) as [`SiTTransformer2DModel`]."""

import argparse
import math
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.sit import SIT_SIZES, SiTTransformer2DModel


def load_original_sit(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    num_attention_heads: int | None = None,
    num_classes: int | None = None,
) -> SiTTransformer2DModel:
    """
    The network of a SiT checkpoint, in evaluation mode and its own dtype.

    Size, patch and channels, and whether the last layer has channels for sigma, follow from the weights' shapes. Of a
    training checkpoint (`model`, `ema`, `opt`, `args`) the average is taken.

    Args:
        path_or_state_dict (`str` or `dict`): the `.pt` file, or what it holds.
        num_attention_heads (`int`, *optional*): of the published size by default; shapes do not tell.
        num_classes (`int`, *optional*):
            classes; by default what the checkpoint's `args` say, else one less than the embedding has rows, the last
            row being the null class, as SiT is trained.

    Raises:
        ValueError: a file with more in it than tensors and `argparse.Namespace`, of which no code has run; keys that
            are unknown or missing; a size that is none of the published ones, without `num_attention_heads`.
    """
    if isinstance(path_or_state_dict, Mapping):
        checkpoint = path_or_state_dict
    else:
        checkpoint = _read(path_or_state_dict)
    arguments = None
    if isinstance(checkpoint, Mapping) and "ema" in checkpoint:
        unknown = set(checkpoint) - {"model", "ema", "opt", "args"}
        if unknown:
            raise ValueError(f"the checkpoint has {sorted(unknown)} beside model, ema, opt and args: it is not SiT's.")
        checkpoint, arguments = checkpoint["ema"], checkpoint.get("args")
    if num_classes is None:
        num_classes = getattr(arguments, "num_classes", None)
    if not _is_state_dict(checkpoint):
        raise ValueError("the checkpoint is neither a state dict nor a training checkpoint with one under 'ema'.")
    with torch.device("meta"):  # no random weights that are thrown away
        model = SiTTransformer2DModel(**infer_sit_config(checkpoint, num_attention_heads, num_classes))
    _check_keys(checkpoint, model.state_dict())
    borrowed = isinstance(path_or_state_dict, Mapping)  # the caller's tensors stay the caller's
    weights = {name: value.detach().clone() if borrowed else value.detach() for name, value in checkpoint.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _read(path: str | os.PathLike) -> Any:
    file = open(path, "rb")
    try:
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{os.fspath(path)} is refused as a SiT checkpoint: it is damaged, or has more in it than tensors and "
            f"argparse.Namespace ({reason}). Nothing in it was executed."
        ) from error


def infer_sit_config(
    state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """The config of [`SiTTransformer2DModel`] that has these weights."""
    needed = ("x_embedder.proj", "final_layer.linear", "y_embedder.embedding_table", "blocks.0.mlp.fc1")
    missing = [f"{name}.weight" for name in needed if f"{name}.weight" not in state_dict]
    if missing or "pos_embed" not in state_dict:
        raise ValueError(f"the state dict lacks {(missing or ['pos_embed'])[0]}: it is not SiT's.")
    patches, last, labels, fc1 = (state_dict[f"{name}.weight"] for name in needed)
    width, channels, patch, _ = patches.shape
    depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    if num_attention_heads is None:
        heads = {(size["num_layers"], size["hidden_size"]): size["num_attention_heads"] for size in SIT_SIZES.values()}
        if (depth, width) not in heads:
            raise ValueError(
                f"{depth} layers of width {width} are none of SiT's sizes ({', '.join(SIT_SIZES)}), and shapes do not "
                "tell the number of heads: pass num_attention_heads."
            )
        num_attention_heads = heads[depth, width]
    classes = len(labels) - 1 if num_classes is None else num_classes
    if len(labels) - classes not in (0, 1):
        raise ValueError(f"num_classes={classes} does not fit an embedding of {len(labels)} rows.")
    outputs = len(last) // patch**2
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"the last layer has {outputs} channels: they must be {channels} or, with sigma, twice that.")
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


def _check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    unknown, missing = sorted(given.keys() - expected.keys()), sorted(expected.keys() - given.keys())
    if unknown or missing:
        raise ValueError(
            f"the state dict is not SiT's: unknown keys {unknown or 'none'}, missing keys {missing or 'none'}."
        )
    wrong = [name for name, value in given.items() if value.shape != expected[name].shape]
    if wrong:
        shapes = f"{tuple(given[wrong[0]].shape)}, but it must be {tuple(expected[wrong[0]].shape)}"
        raise ValueError(f"{wrong[0]} has shape {shapes}.")
