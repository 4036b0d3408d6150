# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import copy_whole, reshard, whole


class PolicyEMA:
    """Float32 average of trained parameters, corrected for its start as Adam's moments are."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in _trainable(model)}

    @torch.no_grad()
    def share_out(self, model: nn.Module) -> None:
        """Keeps the same part of every average as this process holds of the parameter."""
        for name, parameter in _trainable(model):
            average, self.averages[name] = self.averages[name], parameter.detach().float().clone()
            copy_whole(self.averages[name], whole(average))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Adds the weights after update `step`, which counts from 1."""
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, parameter in _trainable(model):
            self.averages[name].lerp_(parameter.detach().float(), share)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Puts the averages in place of the parameters, which come back at the end."""
        originals = {name: p.detach().clone() for name, p in _trainable(model)}
        try:
            _assign(model, self.averages)
            yield
        finally:
            _assign(model, originals)

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """Whole averages in CPU memory. All processes call it; those with `keep=False` get nothing."""
        wholes = ((name, whole(average)) for name, average in self.averages.items())
        return {name: average.to("cpu", copy=True) for name, average in wholes if keep}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            copy_whole(average, state[name])


class OldPolicy(PolicyEMA):
    """An average that lags behind the weights, without correction for its start: the old policy of some losses."""

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Moves the average to the weights, by all but the share `decay` of the way, in new tensors."""
        parameters = _trainable(model)
        self.averages = {name: self.averages[name].lerp(p.detach().float(), 1 - self.decay) for name, p in parameters}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    reshard(model)
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in _trainable(model):
        parameter.copy_(values[name])
