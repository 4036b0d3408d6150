# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Preparing a network for training: precision, dropout, adapter, and what transformers expects of a model."""

import copy
import json

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.configuration_utils import FrozenDict
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from ..merging.adapters import changes_base
from ..policies import DiffusionPolicy
from ..saving import without_machine
from .base_config import DiffusionTrainerConfig

logger = get_logger(__name__)

_FOLD_IN = "fold it in with `merge_and_unload()`, or with `fuse_lora()` and `unload_lora_weights()` of the pipeline"


class _NetworkConfig(FrozenDict):
    """A diffusers config with the methods that transformers' callbacks call on a model's config."""

    def to_dict(self) -> dict[str, object]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # Trainer sets `use_cache`, which must not reach the saved config


def plain_network(policy: DiffusionPolicy) -> nn.Module:
    """Takes a policy's network out of the wrappers of `torch.compile`, which would change the names of its weights."""
    network = getattr(policy.model, "_orig_mod", policy.model)
    if any(isinstance(module, OptimizedModule) for module in policy.model.modules()):
        logger.warning("The network is trained without its own torch.compile: set torch_compile=True.")
    for module in list(network.modules()):
        for name, part in module.named_children():
            if isinstance(part, OptimizedModule):
                setattr(module, name, part._orig_mod)
    for name, part in getattr(getattr(policy, "pipeline", None), "components", {}).items():
        if isinstance(part, nn.Module) and part is not policy.model and _adapted_layers(part):
            raise ValueError(f"{name} carries an adapter, but is not trained: {_FOLD_IN}.")
    return network


def prepare_network(network: nn.Module, args: DiffusionTrainerConfig, peft_config: PeftConfig | None) -> nn.Module:
    """Prepares a network for training; with an adapter, a given one or its own, returns peft's wrapper of it."""
    carried: dict[str, Tensor] = {}
    if _adapted_layers(network):
        if peft_config is not None:
            raise ValueError(f"the network has an adapter: pass no peft_config to train it further, or {_FOLD_IN}.")
        network, peft_config, carried = _without_its_adapter(network)
    if args.activation_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        # Trainer calls a method that diffusers' models do not have. A bound one would tie copies to the original.
        network.activation_checkpointing_enable = lambda **_: None  # type: ignore[assignment]
    if hasattr(network, "_internal_dict"):
        network._internal_dict = _NetworkConfig(without_machine(network._internal_dict))
    if peft_config is not None:
        network = _with_adapter(network, peft_config, args.seed)
        if carried:
            set_peft_model_state_dict(network, carried)
    elif any(p.dtype != torch.float32 for p in network.parameters() if p.requires_grad):
        logger.warning("Weights in half precision would lose small updates: they are trained in float32; see bf16.")
        network.float()
    if asks_for_normalization(network):
        network.normalize_weights()  # type: ignore[operator]
    disable_dropout(network)  # the adapter's as well
    return network


def _adapted_layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _without_its_adapter(network: nn.Module) -> tuple[nn.Module, PeftConfig, dict[str, Tensor]]:
    """Takes the adapter out of a network. Returns the network, and configuration and weights of the adapter."""
    found: dict[str, PeftConfig] = network.peft_config  # type: ignore[assignment]
    if len(found) > 1 or any(layer.merged or layer.disable_adapters for layer in _adapted_layers(network)):
        raise ValueError(f"the network's adapters, {', '.join(found)}, are fused, off, or several: {_FOLD_IN}.")
    ((name, config),) = found.items()
    for layer in _adapted_layers(network):
        if isinstance(layer, LoraLayer):  # `set_adapters` may have weighted it, which no configuration says
            asked = layer.scaling[name]
            layer.set_scale(name, 1.0)
            for key, parameter in layer.named_parameters():
                if f"_B.{name}" in key:
                    parameter.data *= asked / layer.scaling[name]
    weights, prefix = get_peft_model_state_dict(network, adapter_name=name), "base_model.model."
    weights = {prefix + key.removeprefix(prefix): value.detach().clone() for key, value in weights.items()}
    if isinstance(network, PeftModel):
        network = network.unload()
    else:
        network.unload_lora()  # type: ignore[operator]
    return network, config, weights


def _with_adapter(network: nn.Module, peft_config: PeftConfig, seed: int) -> nn.Module:
    peft_config = copy.deepcopy(peft_config)  # peft writes into it
    start = getattr(peft_config, "init_lora_weights", None)
    if changes_base(start):
        reason = "changes the weights below the adapter, which then fits no other copy of the model"
        raise ValueError(f"init_lora_weights={start!r} {reason}: use True, 'gaussian' or 'orthogonal'.")
    if getattr(peft_config, "target_modules", False) is None:
        attention = ["to_q", "to_k", "to_v", "to_out.0"]  # diffusers' names of the projections
        peft_config.target_modules = getattr(network, "_lora_target_modules", attention)
    peft_config.task_type = None  # a language-model task would wrap the network in a class it does not fit
    peft_config.inference_mode = False  # in a saved configuration it is True, and would freeze the adapter
    network.requires_grad_(False)
    set_seed(seed)  # the adapter starts the same on every process
    adapted = get_peft_model(network, peft_config)
    for layer in map(BaseTunerLayer.get_base_layer, _adapted_layers(adapted)):
        if getattr(layer, "groups", 1) > 1:
            raise ValueError(f"peft cannot merge an adapter of a grouped convolution, {layer}: set exclude_modules.")
    return adapted


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
