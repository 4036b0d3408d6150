# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Merging coefficients: the Gaussian policy that draws samples, and the map from a sample to coefficients.

Section 3.3 of [arXiv 2607.02291](https://huggingface.co/papers/2607.02291), which names no map.
"""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .posthoc import posthoc_ema_coefficients, power_profile_coefficients

COEFFICIENT_MAPS = ("affine", "softmax", "none")
GRANULARITIES = ("per_model", "per_block", "per_parameter_group")


def coefficients_of(samples: Tensor, coefficient_map: str) -> Tensor:
    """Maps samples `(..., N_c)`: `"softmax"` to positive ones of sum one, `"affine"` to the nearest of sum one."""
    if coefficient_map == "softmax":
        return samples.softmax(dim=-1)
    if coefficient_map == "affine":
        return samples - (samples.sum(dim=-1, keepdim=True) - 1) / samples.shape[-1]
    return samples


def samples_of(coefficients: Tensor, coefficient_map: str) -> Tensor:
    """Inverts [`coefficients_of`] for `coefficients` `(..., N_c)`; raises `ValueError` if no sample maps to them."""
    reached = bool(((coefficients.sum(dim=-1) - 1).abs() < 1e-6).all()) or coefficient_map == "none"
    if coefficient_map == "softmax":
        reached = reached and bool((coefficients > 0).all())
    if not reached:
        found = f"coefficients {coefficients.tolist()} with coefficient_map={coefficient_map!r}"
        raise ValueError(f"{found} must sum to one, and be positive with 'softmax': choose others, or 'none'.")
    return coefficients.log() if coefficient_map == "softmax" else coefficients


def initial_coefficients(
    kind: str | Sequence[float],
    count: int,
    times: Sequence[float] | None = None,
    stds: Sequence[float] | None = None,
    target_std: float = 0.1,
) -> Tensor:
    """
    Computes the coefficients `(N_c,)` that a search starts at, float64: `"uniform"`, `"last"`, numbers, or
    `"post_hoc"`, a power-function average of relative width `target_std`; `times` and `stds` are the checkpoints'.
    """
    for name, values in (("checkpoint_times", times), ("checkpoint_stds", stds), ("initial_coefficients", kind)):
        if not isinstance(values, str | None) and len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} checkpoints: give one each.")
    if not isinstance(kind, str):
        return torch.tensor([float(value) for value in kind], dtype=torch.float64)
    if kind == "last":
        return torch.eye(count, dtype=torch.float64)[-1]
    if kind == "uniform" or count == 1:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    times = [float(i + 1) for i in range(count)] if times is None else times
    if stds is None:
        return power_profile_coefficients(times, target_std)
    return posthoc_ema_coefficients(times, stds, max(times), target_std)


def coefficient_groups(keys: Iterable[str], granularity: str) -> tuple[dict[str, int], list[str]]:
    """
    Groups the tensors that share coefficients. Returns the index of each tensor's group, and the groups' names.

    `"per_model"` makes one group, as in the paper. `"per_block"` makes one for each block, such as `blocks.3` or
    `unet.enc.64x64_block0`, and for each module outside, such as `x_embedder`. `"per_parameter_group"` makes one for
    the same parameter of all blocks, such as `blocks.#.attn.qkv`. LoRA factors belong to the weight that they adapt.
    """
    of_key = {key: _group(key, granularity) for key in keys}
    names = list(dict.fromkeys(of_key.values()))
    if granularity == "per_block" and len(names) == 1:
        found = f"granularity='per_block' finds one block only, {names[0]!r}, as a block has a number in its name"
        raise ValueError(f"{found}: use 'per_model' or 'per_parameter_group'.")
    return {key: names.index(name) for key, name in of_key.items()}, names


def _group(key: str, granularity: str) -> str:
    if granularity == "per_model":
        return "all"
    # from peft's names of factors to the network's: one factor without its partner would mean nothing
    key = re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", ".weight", key.removeprefix("base_model.model."))
    parts = key.split(".")
    if granularity == "per_parameter_group":
        return re.sub(r"\d+", "#", ".".join(parts[:-1]) or key)
    # further down, a number right before the parameter's name is a layer's, as in t_embedder.mlp.0.weight
    numbered = (i for i, part in enumerate(parts[:-1]) if re.search(r"\d", part) and (i < 2 or i < len(parts) - 2))
    return ".".join(parts[: next(numbered, 0) + 1])


class EMANet(nn.Module):
    """
    Mean of the Gaussian policy over coefficients: an MLP on a learnable embedding (Section 3.3, Eq. 8). The last layer
    starts at zero, so the first mean is exactly `initial` `(G, N_c)`; with `num_layers=0` the mean itself is the
    parameter. It changes by `scale` for a network output of 1.
    """

    initial: Tensor
    scale: Tensor

    def __init__(self, initial: Tensor, num_layers: int = 3, hidden_size: int = 64, scale: float = 1.0):
        super().__init__()
        self.register_buffer("initial", initial.double())
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))  # a part of what is learnt
        self.embedding = nn.Parameter(torch.randn(hidden_size) if num_layers else torch.zeros(initial.numel()))
        sizes = [hidden_size] * num_layers + [initial.numel()]
        layers: list[nn.Module] = []
        for size, next_size in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.SiLU()] * bool(layers) + [nn.Linear(size, next_size)]
        if layers:
            nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        """Returns the mean, `(G, N_c)`, float64."""
        with torch.autocast(self.embedding.device.type, enabled=False):  # a coefficient has more than three digits
            return self.initial + self.scale * self.layers(self.embedding).double().view_as(self.initial)


def gaussian_samples(
    mean: Tensor, std: float, count: int, generator: torch.Generator, antithetic: bool = False
) -> Tensor:
    """Draws samples `(B, G, N_c)`, float64 (Eq. 8); with `antithetic` in pairs, opposite about the mean."""
    drawn = (count + 1) // 2 if antithetic else count
    noise = torch.randn(drawn, *mean.shape, generator=generator, dtype=torch.float64)
    if antithetic:
        noise = torch.cat([noise, -noise])[:count]
    return mean.detach().cpu() + std * noise


def gaussian_log_prob(samples: Tensor, mean: Tensor, std: float) -> Tensor:
    """Computes the log-density `(B,)` of samples `(B, G, N_c)`, summed over coefficients (Eq. 9)."""
    per_coefficient = -((samples - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return per_coefficient.flatten(1).sum(dim=1)
