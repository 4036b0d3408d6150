# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What autograd holds for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Held:
    """Bytes held now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def held_for_backward(weights: bool = True) -> Iterator[Held]:
    """Counts while the context lasts; with `weights=False`, not what parameters take anyway."""
    held = Held()

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            counts = weights or not isinstance(tensor, torch.nn.Parameter)
            self.tensor, self.size = tensor, tensor.nbytes if counts else 0
            held.add(self.size)

        def __del__(self) -> None:
            held.add(-self.size)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield held
