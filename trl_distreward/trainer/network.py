# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Preparing a network for training: precision, dropout, adapter, and what transformers expects of a model."""

import json

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.configuration_utils import FrozenDict
from peft import PeftConfig, get_peft_model
from torch import nn

from ..merging.adapters import changes_base
from .base_config import DiffusionTrainerConfig

logger = get_logger(__name__)


class _NetworkConfig(FrozenDict):
    """A diffusers config with the methods that transformers' callbacks call on a model's config."""

    def to_dict(self) -> dict[str, object]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # Trainer sets `use_cache`, which must not reach the saved config


def prepare_network(network: nn.Module, args: DiffusionTrainerConfig, peft_config: PeftConfig | None) -> nn.Module:
    """Prepares a policy's network for training; with an adapter, returns peft's wrapper of it."""
    if args.activation_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        # Trainer calls a method that diffusers' models do not have. A bound one would tie copies to the original.
        network.activation_checkpointing_enable = lambda **_: None  # type: ignore[assignment]
    if hasattr(network, "_internal_dict"):
        network._internal_dict = _NetworkConfig(network._internal_dict)
    if peft_config is not None:
        network = _with_adapter(network, peft_config, args.seed)
    elif any(p.dtype != torch.float32 for p in network.parameters() if p.requires_grad):
        logger.warning("Weights in half precision would lose small updates: they are trained in float32; see bf16.")
        network.float()
    if asks_for_normalization(network):
        network.normalize_weights()  # type: ignore[operator]
    disable_dropout(network)  # the adapter's as well
    return network


def _with_adapter(network: nn.Module, peft_config: PeftConfig, seed: int) -> nn.Module:
    start = getattr(peft_config, "init_lora_weights", None)
    if changes_base(start):
        reason = "changes the weights below the adapter, which then fits no other copy of the model"
        raise ValueError(f"init_lora_weights={start!r} {reason}: use True, 'gaussian' or 'orthogonal'.")
    if getattr(peft_config, "target_modules", False) is None:
        attention = ["to_q", "to_k", "to_v", "to_out.0"]  # diffusers' names of the projections
        peft_config.target_modules = getattr(network, "_lora_target_modules", attention)
    peft_config.task_type = None  # a language-model task would wrap the network in a class it does not fit
    network.requires_grad_(False)
    set_seed(seed)  # the adapter starts the same on every process
    return get_peft_model(network, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Switches all dropout off for good, label dropout too: it would move log-probabilities beyond the clip range."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "class_dropout_prob"):
            if isinstance(vars(module).get(name), float):
                vars(module)[name] = 0.0


def asks_for_normalization(network: nn.Module) -> bool:
    """Whether the network's config has `forced_weight_normalization=True`."""
    return bool(getattr(getattr(network, "config", None), "forced_weight_normalization", False))
