# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The pages that a person reads, taken apart for the tests."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "source"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(SOURCE.glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, {self.language} block {self.number}"


def blocks(language: str | None = None) -> list[Block]:
    """Of one language, or all, each numbered among those of its language on its page."""
    found = []
    for page in PAGES:
        numbers: dict[str, int] = {}
        for name, text in FENCE.findall(page.read_text()):
            number = numbers[name] = numbers.get(name, -1) + 1
            if language in (None, name):
                found.append(Block(page, number, name, text))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    """Code within sentences, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as both GitHub and the built pages name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.replace("`", "")) for heading in headings]
    return {heading.strip().lower().replace(" ", "-") for heading in plain}
