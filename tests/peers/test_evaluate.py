# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Our modules of metrics under the tests that Hugging Face `evaluate` has for all of its own."""

import os
import tempfile
from contextlib import chdir, contextmanager

import pytest

from tests.peers import peer_tests
from tests.test_metrics_hub import HUB, caches  # noqa: F401

pytestmark = pytest.mark.slow

peer_tests("evaluate", "utils")  # skips without a checkout
FOLDER = tempfile.mkdtemp()  # in which ours are where theirs would be
for name in ("metrics", HUB.name):
    os.symlink(HUB, f"{FOLDER}/{name}")
with chdir(FOLDER):
    LocalModuleTest = peer_tests("evaluate", "test_metric_common").LocalModuleTest


@pytest.fixture(autouse=True)
def in_folder(monkeypatch):
    monkeypatch.chdir(FOLDER)


class TestModules(LocalModuleTest):
    @contextmanager
    def use_local_metrics(self, evaluation_module_type):
        """Leaves the paths of the examples as they are."""
        yield


del LocalModuleTest
