# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The pages of the documentation, taken apart for tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """Texts of a page's fenced blocks of one language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def all_blocks(language):
    """Parameters of a test: the text of each block."""
    found = [(page, number, text) for page in PAGES for number, text in enumerate(blocks(page, language))]
    return [pytest.param(text, id=f"{name_of(page)}, block {number}") for page, number, text in found]


def prose(page):
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def code_spans(page):
    """Code within sentences, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
