# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Merge LoRA adapters exactly.

An adapter adds `s B A` to a weight. The combination of N adapters, `sum_i w_i s B_i A_i`, is an adapter of N times the
rank: stack the rows of all `A_i`, and the columns of all `w_i B_i`. Summing the `A_i` and the `B_i` as if they were
weights gives another model, with the cross terms `w_i w_j B_i A_j`.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sources import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER = "adapter"  # where this library's trainers save one
_LOW_RANK = re.compile(r"\.lora_(embedding_)?(?P<factor>[AB])(\.weight)?$")
# names of factors by peft, diffusers and kohya, before and after peft
_FACTOR = re.compile(r"(^|[._])lora_(embedding_)?[AB](\.|$)|[._]lora[._](up|down)\.|lora_linear_layer\.(up|down)\.")
# kinds of LoRA whose sum is no LoRA of concatenated factors
_VARIANTS = ["use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"]
_VARIANTS += ["monteclora_config", "target_parameters"]
# initializations that move a part of the network's own weights into the adapter
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# fields in which adapters may differ and still be the same function of their weights
_IRRELEVANT = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version"}
_IRRELEVANT |= {"revision", "task_type"}


def concatenated_axis(key: str) -> int | None:
    """The dimension of a LoRA factor that is its rank: 0 for an A, 1 for a B, `None` for other tensors."""
    match = _LOW_RANK.search(key)
    return None if match is None else "AB".index(match["factor"])


def concatenated(members: Sequence[Tensor], weights: Sequence[float], axis: int) -> Tensor:
    """Concatenates all adapters' factors with one name, those of B times their weight, in float32 or better."""
    wide = torch.promote_types(members[0].dtype, torch.float32)
    if axis == 0:
        return torch.cat([member.to(wide) for member in members])
    return torch.cat([member.to(wide) * weight for member, weight in zip(members, weights, strict=True)], dim=1)


def merged_adapter_config(members: Sequence["Checkpoint"]) -> dict[str, object] | None:
    """Builds the configuration of the merged adapter; `None` for whole models, `ValueError` if they differ."""
    configs = [member.adapter_config for member in members if member.adapter_config is not None]
    for member in members:
        factor = next((key for key in member.specs if _FACTOR.search(key)), None)
        if member.adapter_config is None and (configs or factor):
            reason = f"LoRA factors such as {factor} need" if factor else "other checkpoints have"
            raise ValueError(f"{member.source} has no {ADAPTER_CONFIG}, which {reason}: save it by save_pretrained.")
    if not configs:
        return None
    for member in members:
        _check_config(member, members[0])
    count, config = len(members), configs[0]
    # peft scales by alpha / rank, or by alpha / sqrt(rank) with use_rslora
    alpha = count**0.5 if config.get("use_rslora") else count
    return config | {
        "init_lora_weights": True,  # until the merged weights are in place
        "r": config["r"] * count,
        "lora_alpha": config["lora_alpha"] * alpha,
        "rank_pattern": {key: rank * count for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: value * alpha for key, value in (config.get("alpha_pattern") or {}).items()},
    }


def _check_config(member: "Checkpoint", first: "Checkpoint") -> None:
    config, expected = member.adapter_config or {}, first.adapter_config or {}
    kind = next((f"LoRA with {name}" for name in _VARIANTS if config.get(name)), config.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"{member.source} is {kind}: only plain LoRA adapters can be merged.")
    for key, ((rank, *_), _) in member.specs.items():
        other = re.sub("lora_(embedding_)?A", r"lora_\1B", key)
        if concatenated_axis(key) == 0 and member.specs[other][0][1] != rank:
            reason = "adapts a grouped convolution, whose factors cannot be merged"
            raise ValueError(f"{member.source} {reason}, {key}: train without it, see exclude_modules.")
    if changes_base(config.get("init_lora_weights")):
        start = f"init_lora_weights={config['init_lora_weights']!r}, which changes the network below it"
        raise ValueError(f"{member.source} was started with {start}: pass path_initial_model_for_weight_conversion.")
    for field in sorted({*config, *expected} - _IRRELEVANT):
        if _comparable(config.get(field)) != _comparable(expected.get(field)):
            other = f"{first.source} has {expected.get(field)!r}"
            raise ValueError(f"{member.source} has {field}={config.get(field)!r}, but {other}: leave one out.")


def changes_base(init_lora_weights: bool | str | None) -> bool:
    """Whether an adapter with this initialization changes the weights of the network below it."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_CHANGES_BASE)


def _comparable(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list) else value or None
