# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sections of a merged model's card: its coefficients, and how other merges compare."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .merge_coefficient_trainer import MergeCoefficientTrainer


def place_of(member: Mapping[str, Any]) -> str:
    """Names a checkpoint's place in one word."""
    if "repo_id" not in member:
        return member["path"]
    return f"{member['repo_id']}@{member['revision'][:7]}" + (f":{member['subfolder']}" if member["subfolder"] else "")


def coefficient_section(coefficients: Tensor, names: Sequence[str], pool: Mapping[str, Any]) -> str:
    """A table of coefficients `(G, N_c)`, a row for each checkpoint of `CheckpointPool.describe()`."""
    columns = [f"`{name}`" if len(names) > 1 else "coefficient" for name in names]
    lines = ["## Coefficients", ""]
    lines += [f"| checkpoint | SHA-256 | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for index, member in enumerate(pool["members"]):
        hashes = ", ".join(f"`{value[:12]}`" for value in member["files"].values())
        cells = " | ".join(f"{row[index]:.4f}" for row in coefficients.tolist())
        lines.append(f"| `{place_of(member)}` | {hashes} | {cells} |")
    return "\n".join(lines)


def comparison_table(comparison: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each merge, from the same noise; a column for each metric."""
    metrics = list(next(iter(comparison.values())))
    lines = [f"| merge | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for name, values in comparison.items():
        lines.append(f"| {name} | {' | '.join(f'{values[metric]:.4g}' for metric in metrics)} |")
    return "\n".join(lines)


def describe_merge(trainer: "MergeCoefficientTrainer", described: dict[str, Any]) -> dict[str, Any]:
    """Adds coefficients, pool and comparison to the content of `run.json`."""

    def by_group(coefficients: Tensor) -> dict[str, list[float]]:
        return dict(zip(trainer.group_names, coefficients.tolist(), strict=True))

    described["model"] |= {
        "parameters": sum(p.numel() for p in trainer.merged_network.parameters()),
        "trained": trainer.initial_coefficients.numel(),
    }
    return described | {
        "rewards": {reward.name: reward.weight for reward in trainer.rewards.all},
        "coefficients": by_group(trainer.coefficients),
        "initial_coefficients": by_group(trainer.initial_coefficients),
        "pool": [place_of(member) for member in trainer.pool_description["members"]],
        "comparison": trainer.comparison,
    }
