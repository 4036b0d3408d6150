# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Other libraries' own tests, run on ours. The checkouts that hold them are not part of this one."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DIFFUSERS_TEST_DEVICE", "cpu:0")  # not called "cpu", it passes for an accelerator


def checkout_of(library: str) -> Path | None:
    """The folder with a library's repository that `PEERS_LIBRARY` names, if it holds tests."""
    folder = os.environ.get(f"PEERS_{library.upper()}")
    return Path(folder) if folder and Path(folder, "tests").is_dir() else None


def peer_tests(library: str, module: str) -> ModuleType:
    """Imports `module` of the checkout's `tests` under another name, as `tests` is ours; skips without a checkout."""
    folder, name = checkout_of(library), f"{library}_tests"
    if folder is None:
        reason = f"PEERS_{library.upper()} names no checkout of {library}: its tests are not in the wheel"
        pytest.skip(reason, allow_module_level=True)
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder / "tests")]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.{module}")


def diffusers_tests(module: str) -> ModuleType:
    """Imports a module of diffusers' tests, for a device that those which need an accelerator accept."""
    found = peer_tests("diffusers", module)
    for name, other in sys.modules.items():  # what was to be skipped has been; accelerate knows the CPU as "cpu" only
        if name.startswith("diffusers_tests.") and getattr(other, "torch_device", None) == "cpu:0":
            if name != "diffusers_tests.testing_utils":
                other.torch_device = "cpu"
    return found
