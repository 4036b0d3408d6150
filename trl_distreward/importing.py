# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Objects named by dotted paths on command lines and in configurations."""

import importlib
from typing import Any


def resolve(path: str) -> Any:
    """Imports the object at a dotted path; raises `ValueError` if that fails."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "give a path 'package.module.name', and set PYTHONPATH=. for modules in the current folder"
        raise ValueError(f"{path!r} cannot be imported ({error}): {remedy}.") from error
