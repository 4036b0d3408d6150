# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Commands and recipes of the documentation are read by the programs' own parsers; nothing is run."""

import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from importlib import import_module

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import TrlParser

from tests.docs_pages import PAGES, ROOT, all_blocks, code_spans
from trl_distreward.scripts.cli import COMMANDS

PROGRAMS = ("trl-distreward ", "python ", "torchrun ", "make ", "pip ")
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
PLACEHOLDERS = {"train.py", "recipe.yaml", "merge.yaml"}  # the reader's own


class Parsed(Exception):
    """Raised where a script has read its options."""


def commands(text):
    """Commands of a script as lists of words, without variables set for them."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in lines if line]


def check(words):
    program, *rest = words
    if program == "trl-distreward":
        parse(parser_of(rest[0]), rest[1:])
    elif program == "python":
        check_python(rest)
    elif program == "torchrun":
        check_launcher(get_args_parser(), rest)
    elif words[:2] == ["accelerate", "launch"]:
        check_launcher(launch_command_parser(), rest[1:])
    elif program == "make":
        assert set(rest) <= set(TARGETS), rest
    else:
        assert words[:2] == ["pip", "install"], f"nothing is known of {program!r}"


def parser_of(command):
    assert command in COMMANDS, command
    return import_module(f"trl_distreward.scripts.{command}").make_parser()


def parse(parser, words):
    """Parses options; of a recipe only checks its entries."""
    if isinstance(parser, TrlParser):
        if "--config" in words:
            before, (_, recipe, *after) = words[: words.index("--config")], words[words.index("--config") :]
            words = [*before, *after]
            if recipe not in PLACEHOLDERS:
                check_recipe(parser, yaml.safe_load((ROOT / recipe).read_text()))
        for action in parser._actions:
            action.required = False  # may be in the recipe
    _, unknown = parser.parse_known_args(words)
    assert not unknown, f"no such options: {unknown}"


def check_recipe(parser, recipe):
    known = {action.dest: action.choices for action in parser._actions}
    assert set(recipe) <= set(known), f"no such options: {sorted(set(recipe) - set(known))}"
    for name, value in recipe.items():
        assert known[name] is None or value in known[name] or isinstance(value, bool), f"{name}: {value}"


def check_launcher(parser, words):
    parsed = parser.parse_args(words)
    config = getattr(parsed, "config_file", None)
    assert config is None or (ROOT / config).is_file(), config
    check_python([*["-m"] * bool(parsed.module), parsed.training_script, *parsed.training_script_args])


def check_python(words):
    if words[:2] == ["-m", "trl_distreward"]:
        if words[2:]:
            parse(parser_of(words[2]), words[3:])
    elif words[0] == "-m":
        assert all((ROOT / word).exists() for word in words[2:]), words
    elif words[0] not in PLACEHOLDERS | {"docs/configuration.py"}:
        path = ROOT / words[0]
        check_script(path / "__main__.py" if path.is_dir() else path, words[1:])


def check_script(path, words):
    """Runs a script until it has read its options."""
    read = ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    def stop_with_recipe(self, *args, **kwargs):
        parse(self, words)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", stop)
        patch.setattr(TrlParser, "parse_args_and_config", stop_with_recipe)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("text", all_blocks("bash"))
def test_commands_parse(text):
    for words in commands(text):
        check(words)


SPANS = {re.sub(r"^(?:\w+=\S+ )+", "", span) for page in PAGES for span in code_spans(page)}
PARTIAL = re.compile(r"…|[A-Z]{6}|^trl-distreward \w+$| convert \w+$|statistics --")


@pytest.mark.parametrize("command", sorted(s for s in SPANS if s.startswith(PROGRAMS) and not PARTIAL.search(s)))
def test_commands_within_sentences_parse(command):
    check(*commands(command))


@pytest.mark.parametrize("text", all_blocks("yaml"))
def test_recipes_are_known(text):
    recipe = yaml.safe_load(text)
    check_recipe(parser_of("merge" if "checkpoints" in recipe else "train"), recipe)


@pytest.mark.parametrize("line", ["trl-distreward train --learnign_rate 1", "python examples/digits.py --sede 0"])
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(*commands(line))


def test_every_script_is_named_on_a_page():
    imported = "runs.py results.py mnist.py cifar.py"
    told = imported.join(page.read_text() for page in PAGES)
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert path.name in told, path
