# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of LoRA adapters, merged exactly.

An adapter adds `s B A` to a weight. The combination of N of them, `sum_i w_i s B_i A_i`, is itself an adapter, of N
times the rank: rows of all `A_i` below one another, columns of all `w_i B_i` beside one another. Combining the `A_i`
and the `B_i` on their own, as if they were weights, gives another model: it has the cross terms `w_i w_j B_i A_j`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
_LOW_RANK = re.compile(r"\.lora_(embedding_)?(?P<factor>[AB])(\.weight)?$")
# As peft, diffusers and kohya name them, before and after peft
_FACTOR = re.compile(r"(^|[._])lora_(embedding_)?[AB](\.|$)|[._]lora[._](up|down)\.|lora_linear_layer\.(up|down)\.")
# Ways to start an adapter that take from the network's own weights what the adapter then holds
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# What may differ between adapters that are the same function of their weights
_IRRELEVANT = {
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}


def concatenated_axis(key: str) -> int | None:
    """The dimension that is the rank, of a factor of an adapter: 0 of an A, 1 of a B, `None` of any other tensor."""
    match = _LOW_RANK.search(key)
    return None if match is None else 0 if match["factor"] == "A" else 1


def is_factor(key: str) -> bool:
    """Whether a tensor's name is that of a factor of a LoRA, by any library's convention."""
    return _FACTOR.search(key) is not None


def concatenated(key: str, members: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """All members' factors of one key, those of B times their weight, in float32 or better."""
    axis = concatenated_axis(key)
    assert axis is not None
    wide = torch.promote_types(members[0].dtype, torch.float32)
    if axis == 0:
        return torch.cat([member.to(wide) for member in members])
    return torch.cat([member.to(wide) * weight for member, weight in zip(members, weights, strict=True)], dim=1)


def check_configs(configs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: an adapter is not a LoRA, or differs from the first in what its weights mean.
    """
    for config, name in zip(configs, names, strict=True):
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
            raise ValueError(f"{name} is a {kind} adapter: only LoRA adapters can be merged as a pool.")
        if changes_base(config.get("init_lora_weights")):
            raise ValueError(
                f"{name} was begun with init_lora_weights={config['init_lora_weights']!r}, which changes the network "
                "that it is an adapter of: save it with peft's path_initial_model_for_weight_conversion, as one of "
                "the network as it was."
            )
        for field in sorted({*config, *configs[0]} - _IRRELEVANT):
            ours, first = (_comparable(c.get(field)) for c in (config, configs[0]))
            if ours != first:
                raise ValueError(
                    f"{name} has {field}={config.get(field)!r}, but {names[0]} has {configs[0].get(field)!r}: "
                    "adapters of a pool must be alike."
                )


def changes_base(init_lora_weights: Any) -> bool:
    """Whether an adapter that is begun so changes the weights of the network beneath it."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_CHANGES_BASE)


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value or None


def widened_config(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The configuration of `count` adapters beside one another: that many times the rank, at the same scaling."""
    # peft scales by alpha / rank, or alpha / sqrt(rank) with use_rslora
    alpha = count**0.5 if config.get("use_rslora") else count
    widened = json.loads(json.dumps(config))
    widened["init_lora_weights"] = True  # until the merged weights are in place
    widened["r"] = config["r"] * count
    widened["lora_alpha"] = config["lora_alpha"] * alpha
    widened["rank_pattern"] = {k: rank * count for k, rank in (config.get("rank_pattern") or {}).items()}
    widened["alpha_pattern"] = {k: value * alpha for k, value in (config.get("alpha_pattern") or {}).items()}
    return widened
