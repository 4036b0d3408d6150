# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from huggingface_hub import constants

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Statistics of one test's images are not kept for another."""
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(constants, "HF_HOME", cache)
    monkeypatch.setenv("HF_HOME", cache)  # of programs that the test starts
