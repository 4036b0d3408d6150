# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import diffusers  # noqa: F401  # before the checkout, which puts its own sources first
import pytest

from tests.peers import checkout_of, diffusers_tests


def pytest_configure(config):
    if checkout_of("diffusers"):
        diffusers_tests("conftest").pytest_configure(config)
        for mark in ("cache", "autoround"):  # used there without being listed
            config.addinivalue_line("markers", mark)


NEEDS_GPU = (
    "whose backend implements streams",
    "device when none is available",
    "requires accelerator, but not found",
    "new() received an invalid combination",  # accelerate, which takes "cpu:0" for a device with memory of its own
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except (RuntimeError, TypeError, ValueError) as error:
        if any(words in str(error) for words in NEEDS_GPU):
            pytest.skip(f"needs a GPU: {error}"[:80])
        raise
