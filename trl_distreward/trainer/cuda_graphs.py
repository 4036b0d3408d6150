# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What `torch.compile` asks of its callers where it records CUDA graphs.

Graphs run in the same memory again: a call overwrites what the last one returned, unless a backward pass is pending.
The gradients of a backward pass are overwritten by the next one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

GRAPH_MODES = ("reduce-overhead", "max-autotune")


def uses_cuda_graphs(args: Any) -> bool:
    """Whether the training arguments' compiler records graphs; it does so on GPUs."""
    if not args.torch_compile:
        return False
    recorded = args.torch_compile_backend == "inductor" and args.torch_compile_mode in GRAPH_MODES
    return recorded or args.torch_compile_backend == "cudagraphs"


def copy_outputs(model: nn.Module) -> None:
    """
    From now on outputs without gradients are copies: samplers keep one velocity while they compute the next.

    With gradients torch itself waits for the backward pass. `torch.compiler.cudagraph_mark_step_begin` is not called:
    once it is, torch frees what a pending backward pass needs at every further call.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output if torch.is_grad_enabled() else tree_map_only(Tensor, torch.clone, output)

    model.register_forward_hook(hook)


def hold_gradients(model: nn.Module) -> None:
    """Gradients in memory of their own, zero, to which every micro-batch of an update is added."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
