# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Values of an update's micro-batches, as weighted means and extremes over all processes."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class UpdateStatistics:
    """Weighted sums over an update's micro-batches; of `"ratio"`, the extremes as well."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.ratios: list[Tensor] = []

    def add(self, weights: Tensor, values: Mapping[str, Tensor]) -> None:
        """Adds values `(P,)` with weights `(P,)`."""
        for name, value in {"weight": torch.ones_like(weights), **values}.items():
            self.sums[name] = self.sums.get(name, 0) + (value.detach().double() * weights).sum()
        if "ratio" in values:
            self.ratios.append(values["ratio"])

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and extremes over all processes, which all call this."""
        sums = accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum")
        values = dict(zip(self.sums, sums.tolist(), strict=True))
        weight = values.pop("weight")
        found = {"ratio/mean" if name == "ratio" else name: value / weight for name, value in values.items()}
        if self.ratios:
            ratios = torch.cat(self.ratios)
            extremes = accelerator.gather(torch.stack([ratios.min(), -ratios.max()])[None])
            low, negative_high = extremes.amin(dim=0).tolist()
            found |= {"ratio/min": low, "ratio/max": -negative_high}
        return found
