# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pieces of HTML: everything that is not made here is escaped."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from .charts import number

LARGEST_SIDE = 1280  # pixels of an embedded picture; larger ones are made smaller


@dataclass(frozen=True)
class Markup:
    """Text that is HTML already."""

    text: str


def html(value: Any) -> str:
    if isinstance(value, Markup):
        return value.text
    if isinstance(value, float):
        return escape(number(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(str(value))


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", numbers: Sequence[int] | None = None
) -> str:
    """Its first column heads the rows; `numbers` are the columns aligned right, all but the first by default."""
    if not rows:
        return ""
    right = set(range(1, len(head)) if numbers is None else numbers)

    def cell(value: Any, column: int, heads: bool) -> str:
        tag = "th" if heads or column == 0 else "td"
        scope = f' scope="{"col" if heads else "row"}"' if tag == "th" else ""
        style = ' class="num"' if column in right else ""
        return f"<{tag}{scope}{style}>{html(value)}</{tag}>"

    def line(cells: Sequence[Any], heads: bool = False) -> str:
        return f"<tr>{''.join(cell(value, column, heads) for column, value in enumerate(cells))}</tr>"

    told, label = (paragraph(caption, "note"), f' aria-label="{escape(caption)}"') if caption else ("", "")
    body = "".join(line(row) for row in rows)
    rows_of_all = f"<thead>{line(head, True)}</thead><tbody>{body}</tbody>"
    return f'{told}<div class="scroll" tabindex="0"><table{label}>{rows_of_all}</table></div>'


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def section(title: str, *parts: str) -> str:
    """Nothing where there is nothing to show."""
    content = "".join(parts)
    if not content:
        return ""
    name = anchor(title)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'


def anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def paragraph(text: str, style: str = "") -> str:
    return f"<p{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{escape(text)}</p>" if text else ""


def setting(value: Any) -> Markup:
    """A value of the configuration as it is written in YAML or JSON."""
    shown = value if isinstance(value, str) else json.dumps(value)
    return Markup(f"<code>{escape(shown)}</code>")


def picture(path: Path, caption: str) -> str:
    """A figure with the picture inside; a caption with the description in the file, if it has one."""
    with Image.open(path) as opened:
        opened.load()
        about = str(opened.info.get("Description", ""))
        image = opened.convert("L" if opened.mode == "L" else "RGB")
    width, height = image.size
    buffer, kind, shrunk = io.BytesIO(), "png", ""
    if max(width, height) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
        kind, shrunk = "jpeg", f"Shown smaller than its {width} x {height} pixels."
    else:
        image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    pixels = ' class="pixels"' if max(width, height) < 400 else ""
    note = " ".join(part for part in (f"{about}." if about else "", shrunk) if part)
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<img{pixels} alt="{escape(f"Grid of generated images, {caption}. {note}")}" width="{image.width}" '
        f'height="{image.height}" src="data:image/{kind};base64,{data}">'
        f"{paragraph(note, 'note')}</figure>"
    )
