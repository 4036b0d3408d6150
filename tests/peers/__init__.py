# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""diffusers' own tests of models and pipelines, run on ours. The checkout that holds them is not part of this one."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CHECKOUT = "PEERS_DIFFUSERS"
if not torch.cuda.is_available():
    os.environ.setdefault("DIFFUSERS_TEST_DEVICE", "cpu:0")  # not called "cpu", it passes for an accelerator


def diffusers_tests(module: str) -> ModuleType:
    """Imports `module` of the checkout's `tests` under another name, as `tests` is ours; skips without a checkout."""
    folder = Path(os.environ.get(CHECKOUT, "")) / "tests"
    if not (os.environ.get(CHECKOUT) and folder.is_dir()):
        reason = f"{CHECKOUT} names no checkout of diffusers: its tests are not in the wheel"
        pytest.skip(reason, allow_module_level=True)
    if "diffusers_tests" not in sys.modules:
        package = ModuleType("diffusers_tests")
        package.__path__ = [str(folder)]
        sys.modules["diffusers_tests"] = package
    found = importlib.import_module(f"diffusers_tests.{module}")
    for name, other in sys.modules.items():  # what was to be skipped has been; accelerate knows the CPU as "cpu" only
        if name.startswith("diffusers_tests.") and getattr(other, "torch_device", None) == "cpu:0":
            if name != "diffusers_tests.testing_utils":
                other.torch_device = "cpu"
    return found
