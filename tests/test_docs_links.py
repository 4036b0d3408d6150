# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Links, pictures and names in the documentation lead somewhere. Addresses of other sites are only read."""

import re
from pkgutil import resolve_name
from urllib.parse import urlsplit

import pytest

from tests.docs_pages import DOCS, PAGES, ROOT, code_spans, name_of, prose
from trl_distreward.scripts import merge, train

LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def anchors(page):
    """Anchors of the headings, on GitHub as on the site."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for picture, text, target in LINK.findall(prose(page)):
        address = urlsplit(target)
        if address.scheme:
            assert address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
            continue
        there = page.parent / address.path if address.path else page
        assert there.is_file(), f"{target} leads to nothing"
        assert not address.fragment or address.fragment in anchors(there), f"{target}: {sorted(anchors(there))}"
        assert not picture or (len(text) > 20 and there.stat().st_size < 150_000), f"{target}: {text}"


def test_every_picture_is_shown():
    shown = {(page.parent / target).resolve() for page in PAGES for _, _, target in LINK.findall(prose(page))}
    assert {path.resolve() for suffix in ("png", "svg") for path in DOCS.rglob(f"*.{suffix}")} <= shown


def test_named_files_exist():
    told = " ".join(span for page in PAGES for span in code_spans(page))
    for name in re.findall(r"\b(?:benchmarks|examples|tests|metrics_hub)/[\w/]+\.\w+", told):
        assert (ROOT / name).exists(), name


def test_the_page_on_the_paper_names_what_there_is():
    spans = code_spans(DOCS / "paper.md")
    functions = [span for span in spans if re.fullmatch(r"[a-z_]+(\.\w+)+", span) and not span.endswith("yaml")]
    options = {match[1] for span in spans if (match := re.fullmatch(r"([a-z]+(?:_[a-z]+)*)(?:=.*)?", span))}
    known = {action.dest for command in (train, merge) for action in command.make_parser()._actions}
    assert len(functions) > 5 and all(callable(resolve_name(f"trl_distreward.{name}")) for name in functions)
    assert len(options) > 20 and options <= {*known, "trl_distreward"}, options - known
