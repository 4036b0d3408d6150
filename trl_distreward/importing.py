# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Objects named by a dotted path, as command lines and configurations name them."""

import importlib
import os
import sys
from typing import Any


def resolve(path: str) -> Any:
    """The object at a dotted path, looked for in the current folder as well; a `ValueError` says what is wrong."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} cannot be imported ({error}): give a dotted path 'package.module.name'."
        ) from error
