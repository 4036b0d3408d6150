# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The rooms of the package: imports go down only, in no circle, and nothing grows without notice."""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports from lower layers alone, and nothing from its neighbours in the same layer
LAYERS = [
    {"seeds"},
    {"sampling", "files", "hub", "conditions", "importing"},
    {"models", "saving"},
    {"pipelines", "conversion", "merging"},
    {"policies", "metrics"},
    {"generation"},
    {"evaluation"},
    {"rewards"},
    {"trainer"},
    {"scripts"},
    {"__main__"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in (ROOT / "trl_distreward").rglob("*.py")}


def run_time_nodes(node):
    """All nodes below, in functions as well, but for those that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from run_time_nodes(child)


def imported(name, path):
    """Modules of the package that a module imports."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        else:
            continue
        yield from (module for module in found if module in FILES and module != name)


@pytest.fixture(scope="module")
def graph():
    graph = defaultdict(set)
    for name, path in FILES.items():
        graph[name].update(imported(name, path))
    return graph


def room(module):
    return module.split(".")[1]


def test_imports_go_down_only(graph):
    assert not graph["trl_distreward"]  # public names are imported when they are asked for
    crossing = [(a, b) for a in graph for b in graph[a] if b != "trl_distreward" and room(a) != room(b)]
    assert len(crossing) > 100
    assert [(a, b) for a, b in crossing if LAYER[room(b)] >= LAYER[room(a)]] == []


def test_there_is_no_circle_of_imports(graph):
    assert "trl_distreward.trainer.checkpointing" in graph["trl_distreward.trainer.base"]
    list(graphlib.TopologicalSorter(graph).static_order())


LINES = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}


def test_no_file_has_more_than_450_lines():
    assert {name: count for name, count in LINES.items() if count > 450} == {}


def test_the_package_has_at_most_its_budget_of_lines():
    assert sum(LINES.values()) <= 14_632


def test_at_most_20_annotations_of_parameters_and_returns_say_any():
    nodes = [node for path in FILES.values() for node in ast.walk(ast.parse(path.read_text()))]
    annotations = [node.annotation for node in nodes if isinstance(node, ast.arg)]
    annotations += [node.returns for node in nodes if isinstance(node, ast.FunctionDef)]
    names = [{n.id for n in ast.walk(each) if isinstance(n, ast.Name)} for each in annotations if each is not None]
    assert len(names) > 1000
    assert sum("Any" in each for each in names) <= 20
