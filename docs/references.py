# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Docstrings in Hugging Face's style, as mkdocstrings reads them: links to public names, and types without markup."""

import re
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).parent / "reference" / "api.md"
NAMES = set(re.findall(r"^::: trl_distreward\.(\w+)", API.read_text(), flags=re.MULTILINE))
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")  # [`~metrics.Distance`]
PARAMETER = re.compile(r"^( +[\w, *]+ )\((.+?)(?:, \*optional\*.*?)?\):", flags=re.MULTILINE)
RETURNED = re.compile(r"^((?:Returns|Yields):\n +)`([^`]+)`:", flags=re.MULTILINE)


class HuggingFaceStyle(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = PARAMETER.sub(lambda match: f"{match[1]}({plain(match[2])}):", obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(linked, RETURNED.sub(r"\1\2:", text))


def plain(annotation: str) -> str:
    """A type without backticks and brackets of references."""
    return REFERENCE.sub(lambda match: match[1].rpartition(".")[2], annotation).replace("`", "")


def linked(match: re.Match) -> str:
    """A link to a public name of this package; plain code for any other name."""
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][trl_distreward.{name}]" if name in NAMES else f"`{name}`"
