# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (path, number, block)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "source").glob("*.md"))]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize(("path", "number", "block"), BLOCKS, ids=[f"{p.name}-{n}" for p, n, _ in BLOCKS])
def test_code_of_the_docs_runs(path, number, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"{path.name}, block {number}", "exec"), {"__name__": "docs"})


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"local: (\w+)", (ROOT / "docs" / "source" / "_toctree.yml").read_text()))
    assert listed == {path.stem for path in (ROOT / "docs" / "source").glob("*.md")}


def test_documented_names_exist():
    import trl_distreward

    for name in re.findall(r"\[\[autodoc\]\] ([\w.]+)", (ROOT / "docs" / "source" / "api.md").read_text()):
        value = trl_distreward
        for part in name.split("."):
            value = getattr(value, part)
        assert value.__doc__, name


def test_no_page_has_a_place_left_to_fill():
    for path in [ROOT / "README.md", *(ROOT / "docs" / "source").glob("*.md")]:
        assert not re.findall(r"^[A-Z]+_(?:TABLE|TEXT)$|TODO|TBD", path.read_text(), flags=re.MULTILINE), path
