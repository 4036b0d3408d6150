# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Links, pictures and references of the pages lead somewhere. Other sites are not asked: their addresses are read."""

import re
from importlib import import_module
from importlib.util import find_spec
from urllib.parse import urlsplit

import pytest

import trl_distreward
from tests.docs_pages import PAGES, ROOT, SOURCE, anchors, code_spans, prose

LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
DOCUMENTED = set(re.findall(r"\[\[autodoc\]\] ([\w.]+)", (SOURCE / "api.md").read_text()))
IMAGES = SOURCE / "images"
MODULES = sorted((ROOT / "trl_distreward").rglob("*.py"))


def links(page):
    return [target for picture, target in LINK.findall(prose(page)) if not picture]


def pictures(page):
    return [target for picture, target in LINK.findall(prose(page)) if picture]


def resolve(name, value=trl_distreward):
    """What `[`name`]` means: an attribute of the package, or of a module of it."""
    for part in name.split("."):
        if hasattr(value, "__path__") and find_spec(f"{value.__name__}.{part}"):
            value = import_module(f"{value.__name__}.{part}")
        else:
            value = getattr(value, part)
    return value


def check_address(target):
    address = urlsplit(target)
    assert address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
    if address.netloc == "huggingface.co" and address.path.startswith("/papers/"):
        check_arxiv(address.path.removeprefix("/papers/"))


def check_arxiv(identifier):
    """`YYMM.NNNNN`: numbers had four digits until 2014."""
    assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{5}", identifier), f"{identifier!r} is no arXiv identifier"
    assert 15 <= int(identifier[:2]) <= 26


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    built = page.parent == SOURCE
    for target in links(page):
        if ":" in target:
            check_address(target)
            continue
        path, _, anchor = target.partition("#")
        # the built pages have no endings; on GitHub, outside of them, files have
        there = page if not path else page.parent / (f"{path}.md" if built else path)
        assert there.exists(), f"{target} of {page.name} leads to nothing"
        if anchor:
            assert anchor in anchors(there), f"{target} of {page.name}: {there.name} has {sorted(anchors(there))}"


def test_arxiv_numbers_are_arxiv_numbers():
    found = 0
    for page in [*PAGES, *MODULES]:
        for identifier in re.findall(r"arXiv[:\s]+(\d[\w.]*\w)", page.read_text()):
            check_arxiv(identifier)
            found += 1
    assert found > 20


def test_pictures_are_there_and_small():
    shown = {(page.parent / target).resolve() for page in PAGES for target in pictures(page)}
    assert shown == {path.resolve() for path in IMAGES.iterdir()}
    for path in shown:
        assert path.stat().st_size < 150_000, path


def test_pictures_are_described():
    for page in PAGES:
        for text in re.findall(r"!\[((?:[^\[\]])*)\]\(", prose(page)):
            assert len(text) > 20, f"{page.name}: {text!r} tells nothing to who cannot see the picture"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_references_are_on_the_api_page(page):
    """Else the built page shows them as they stand."""
    for name in re.findall(r"\[`~?([\w.]+)`\](?!\()", prose(page)):
        resolve(name)
        assert name in DOCUMENTED or name.rpartition(".")[0] in DOCUMENTED, f"{page.name}: {name} is not in api.md"


def test_references_of_docstrings_resolve():
    for path in MODULES:
        for name in re.findall(r"\[`~?([\w.]+)`\](?!\()", path.read_text()):
            if name.startswith(("transformers.", "diffusers.", "huggingface_hub.", "peft.")):
                continue
            try:
                resolve(name)
            except AttributeError:  # then of the module itself, which the API page need not have
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                resolve(name, import_module(module))


def test_files_that_pages_name_are_there():
    for page in PAGES:
        for span in code_spans(page):
            for name in re.findall(r"\b(?:benchmarks|examples|tests)/[\w/]+\.\w+", span):
                assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_paper_index_names_what_there_is():
    """Its functions exist, and its fields are fields or options."""
    parsers = [import_module(f"trl_distreward.scripts.{command}").make_parser() for command in ("train", "merge")]
    fields = {action.dest for parser in parsers for action in parser._actions}
    spans = code_spans(SOURCE / "paper_index.md")
    functions = [span for span in spans if re.fullmatch(r"\w+\.[\w.]+", span) and not span.endswith(".yaml")]
    named = {match[1] for span in spans if (match := re.fullmatch(r"([a-z]+(?:_[a-z]+)*)(?:=.*)?", span))}
    assert len(functions) > 5 and len(named) > 20
    for function in functions:
        assert callable(resolve(function)), function
    assert named <= fields, sorted(named - fields)
