# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Preparing a network for training: precision, dropout, adapter, and what transformers expects of a model."""

import json
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.configuration_utils import FrozenDict
from peft import PeftConfig, get_peft_model
from torch import nn

from ..merging.adapters import changes_base

logger = get_logger(__name__)

# diffusers' names of the attention projections, which an adapter adapts by default
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class _NetworkConfig(FrozenDict):
    """A diffusers config with the methods that transformers' callbacks call on a model's config."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # Trainer sets `use_cache`, which must not reach the saved config


def prepare_network(network: nn.Module, args: Any, peft_config: PeftConfig | None) -> nn.Module:
    """Prepares a policy's network for training; with an adapter, returns peft's wrapper of it."""
    if args.activation_checkpointing:
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"activation_checkpointing=True: {type(network).__name__} does not support it. Leave it off."
            )
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        # Trainer calls a method that diffusers' models do not have. A bound one would tie copies to the original.
        network.activation_checkpointing_enable = _do_nothing  # type: ignore[assignment]
    if hasattr(network, "_internal_dict"):
        network._internal_dict = _NetworkConfig(network._internal_dict)
    if peft_config is not None:
        network = _with_adapter(network, peft_config, args.seed)
    elif any(p.dtype != torch.float32 for p in network.parameters() if p.requires_grad):
        logger.warning(
            "The network's weights are in half precision, which loses small updates: they are trained in float32. Set "
            "bf16=True to run the network in bfloat16."
        )
        network.float()
    if asks_for_normalization(network):
        network.normalize_weights()  # type: ignore[operator]
    disable_dropout(network)  # the adapter's as well
    return network


def _with_adapter(network: nn.Module, peft_config: PeftConfig, seed: int) -> nn.Module:
    start = getattr(peft_config, "init_lora_weights", None)
    if changes_base(start):
        raise ValueError(
            f"init_lora_weights={start!r} changes the weights below the adapter, so the adapter would fit no other "
            "copy of the model: use True, 'gaussian' or 'orthogonal'."
        )
    if getattr(peft_config, "target_modules", False) is None:
        peft_config.target_modules = getattr(network, "_lora_target_modules", list(ATTENTION_PROJECTIONS))
    peft_config.task_type = None  # a language-model task would wrap the network in a class it does not fit
    network.requires_grad_(False)
    set_seed(seed)  # the adapter starts the same on every process
    return get_peft_model(network, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """
    Switches every dropout off for good, label dropout included.

    A policy must predict the same in rollout and replay; label dropout moves log-probabilities by far more than the
    clip range.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        for name in ("dropout_prob", "class_dropout_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
        if isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0


def asks_for_normalization(network: Any) -> bool:
    """Whether the network's config has `forced_weight_normalization=True`."""
    return bool(getattr(getattr(network, "config", None), "forced_weight_normalization", False))


def _do_nothing(**_: Any) -> None:
    pass
