# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint of merging coefficients is resumed from, and must have in common with the run that does."""

from collections.abc import Mapping, Sequence
from typing import Any


def identity_of(args: Any, group_names: Sequence[str], pool: Mapping[str, Any]) -> dict[str, Any]:
    """
    What gives learnt coefficients their meaning.

    Args:
        args ([`MergeCoefficientConfig`]): configuration.
        group_names (`list[str]`): of the coefficients' rows.
        pool (`dict`): [`~merging.CheckpointPool.describe`].
    """
    sizes = ("policy_num_layers", "policy_hidden_size") if args.method == "emanet" else ()
    return {
        "method": args.method,
        **{name: getattr(args, name) for name in sizes},
        "coefficient_map": args.coefficient_map,
        "adapters": pool["adapters"],
        "groups": list(group_names),
        "pool": [sorted(member["files"].values()) for member in pool["members"]],
    }


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a checkpoint's coefficients mean something else in this run.
    """
    for name in [name for name in now if name not in ("groups", "pool")]:  # the method first, then what it has
        if saved[name] != now[name]:
            _refuse(f"{name}={saved[name]!r}, but this run has {name}={now[name]!r}")
    if saved["groups"] != now["groups"]:
        odd = sorted({*saved["groups"]} ^ {*now["groups"]}) or now["groups"]
        _refuse(
            f"{len(saved['groups'])} groups of tensors, but this run has {len(now['groups'])}, and only one of them "
            f"has e.g. {odd[0]!r}"
        )
    if len(saved["pool"]) != len(now["pool"]):
        _refuse(f"{len(saved['pool'])} checkpoints to merge, but this run has {len(now['pool'])}")
    odd = [i for i, (old, new) in enumerate(zip(saved["pool"], now["pool"], strict=True)) if old != new]
    if odd:
        was, found = (pool[odd[0]][0][:12] for pool in (saved["pool"], now["pool"]))
        moved = ", in another order" if sorted(saved["pool"]) == sorted(now["pool"]) else ""
        _refuse(
            f"other checkpoints to merge{moved}: the {odd[0] + 1}. had SHA-256 {was}…, but that of this run has "
            f"{found}…"
        )


def _refuse(difference: str) -> None:
    raise ValueError(
        f"the checkpoint was written by a run with {difference}: coefficients of one mean nothing to the other. "
        "Resume with the pool and the configuration that the run was started with, or start a new run."
    )
