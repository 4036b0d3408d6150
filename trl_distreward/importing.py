# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Objects named by dotted paths on command lines and in configurations."""

import importlib
import os
import sys
from typing import Any


def resolve(path: str) -> Any:
    """Imports the object at a dotted path, from the current folder too; raises `ValueError` if that fails."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error}): give a path 'package.module.name'.") from error
