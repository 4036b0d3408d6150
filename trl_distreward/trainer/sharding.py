# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Weights that FSDP2 or DeepSpeed split over processes: gathering whole tensors, and writing them back.

All processes must call these functions, in the same order.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import State


def is_split(module: nn.Module) -> bool:
    """Whether processes hold parts of the module's weights, or DeepSpeed holds their float32 originals."""
    return any(isinstance(m, FSDPModule) for m in module.modules()) or any(map(_in_deepspeed, module.parameters()))


def reshard(module: nn.Module) -> None:
    """Drops the weights that the last forward pass gathered: until then, parameters are copies that nothing reads."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _in_deepspeed(tensor: Tensor) -> bool:
    # `_hp_mapping` is None on processes that own no part of the tensor
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that this process holds a part of; under DeepSpeed the optimizer's float32 copy."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not _in_deepspeed(tensor):
        return tensor
    import deepspeed

    if tensor.requires_grad:  # frozen ones have no originals
        return deepspeed.utils.safe_get_full_fp32_param(tensor)
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


@torch.no_grad()
def whole_state_dict(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state dict with whole tensors in CPU memory; processes with `keep=False` get nothing."""
    reshard(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wholes = ((name, whole(parameters.get(name, value))) for name, value in module.state_dict().items())
    return {name: value.detach().cpu() for name, value in wholes if keep}


def whole_tensors(state: State, keep: bool = True) -> State:
    """A nested state with whole tensors in CPU memory; processes with `keep=False` get nothing."""
    gathered: State = {}
    for name, value in state.items():
        found = whole_tensors(value, keep) if isinstance(value, dict) else value
        gathered[name] = whole(found).cpu() if isinstance(found, Tensor) else found
    return gathered if keep else {}


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that this process may hold a part of."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        # every process has the whole value, so nothing is sent
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)


def load_whole_state_dict(module: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads a state dict of whole tensors; raises `RuntimeError` if names differ and `strict` is set."""
    if not is_split(module):
        module.load_state_dict(weights, strict=strict)
        return
    reshard(module)
    targets = module.state_dict()  # shares memory with the weights
    odd = set(targets) - set(weights) if strict else set()
    if odd:
        raise RuntimeError(f"the weights belong to another model: they lack {min(odd)}.")
    for name, value in weights.items():
        copy_whole(targets[name], value)


def without_weights(module: nn.Module) -> nn.Module:
    """Copies a module without its parameters, which are on the meta device; buffers are real."""
    copies = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, copies)
