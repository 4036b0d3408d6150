# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Settings that go together, by name."""

import re
from dataclasses import field
from typing import Any

_RECOMMENDED = {
    "loss_type": "backprop",
    "sampler": "ode",
    "backprop_steps": 3,
    "reference_update": "rolling",
    "num_subsets": 256,
    "replace_size": 1,
    "top_advantage_quantile": 1.0,
    "lr_scheduler_type": "linear",
    "ema_decay": 0.9,
}

# What a [`DiffusionDistributionConfig`] takes where a field is not given, all recipes for the same fields
RECIPES: dict[str, dict[str, Any]] = {
    # arXiv 2607.02291, Section 4.1
    "paper": {
        "loss_type": "grpo",
        "sampler": "sde",
        "backprop_steps": 1,
        "reference_update": "refresh",
        "num_subsets": 128,
        "replace_size": 50,
        "top_advantage_quantile": 0.25,
        "lr_scheduler_type": "constant",
        "ema_decay": 0.0,
    },
    "recommended": _RECOMMENDED,
    # for rewards without a gradient
    "policy_gradient": {**_RECOMMENDED, "loss_type": "grpo", "sampler": "sde", "backprop_steps": 1},
}


def recipe_field(name: str, help: str, **metadata: Any) -> Any:
    """A dataclass field that is the recipe's where it is `None`."""
    return field(default=None, metadata={"help": f"{help} By default the recipe's: {values_of(name)}.", **metadata})


def values_of(name: str, mark: str = "") -> str:
    """A field's values with the recipes that have them, in words; each between `mark`s."""
    recipes: dict[str, list[str]] = {}
    for recipe, settings in RECIPES.items():
        recipes.setdefault(str(settings[name]), []).append(f"{mark}{recipe}{mark}")
    return ", ".join(f"{mark}{value}{mark} under {' and '.join(names)}" for value, names in recipes.items())


def with_values(doc: str) -> str:
    """A class's docstring, in which fields that default to the recipe's say what that is."""

    def tell(match: re.Match[str]) -> str:
        return f"{match[0]}: {values_of(match[1], mark='`')}"

    return re.sub(r"^ +(\w+) \(.* defaults to the recipe's", tell, doc, flags=re.MULTILINE)


def fill_in(config: Any) -> None:
    """Gives fields that are `None` the value of `config.recipe`."""
    for name, value in RECIPES[config.recipe].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
