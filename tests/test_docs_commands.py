# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Commands and recipes of the pages are such as the programs take: each is read by the program's own parser, and nothing
is run.
"""

import ast
import re
import runpy
import shlex
import sys
import tomllib
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import TrlParser

from tests.docs_pages import PAGES, ROOT, blocks, code_spans
from trl_distreward.scripts.cli import COMMANDS

PROGRAMS = ("trl-distreward", "python", "torchrun", "accelerate", "make")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What stands for a script or a recipe of the reader's own
PLACEHOLDERS = {"train.py", "recipe.yaml", "merge.yaml"}


class Parsed(Exception):
    """Raised where a script has read its options."""


# ---- a little of what a shell does ----


def commands(text):
    """Commands of a script, as lists of words, with variables put in; of a loop, its first turn."""
    text = re.sub(r"(?:^|(?<=\s))#.*", "", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    variables, words, found = {}, [], []
    for token in [*lexer, "\n"]:
        if set(token) - set(";\n"):
            words.append(token)
            continue
        if words[:1] == ["do"]:
            words = words[1:]
        if words[:1] == ["for"]:
            variables[words[1]] = words[3]
            words = []
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words and words != ["done"]:
            found.append([part for word in words for part in substitute(word, variables)])
        words = []
    return found


def substitute(word, variables):
    whole = re.fullmatch(r"\$(\w+)", word)
    if whole:
        return variables[whole[1]].split()
    return [re.sub(r"\$(\w+)", lambda match: variables[match[1]], word)]


# ---- the programs ----


def check(words):
    program, *rest = words
    if program == "trl-distreward":
        check_cli(rest)
    elif program == "python":
        check_python(rest)
    elif program == "torchrun":
        check_launcher(get_args_parser(), rest)
    elif program == "accelerate":
        assert rest[0] == "launch"
        check_launcher(launch_command_parser(), rest[1:])
    elif program == "make":
        assert set(rest) <= targets(), f"the Makefile has no {rest}"
    elif program == "pip":
        check_pip(rest)
    else:
        assert words[:2] == ["git", "clone"], f"nothing is known of {program!r}"


def check_cli(words):
    assert words[0] in COMMANDS or words == ["--help"], f"trl-distreward has no {words[0]!r}"
    if words[0] in COMMANDS and len(words) > 1:
        parse(import_module(f"trl_distreward.scripts.{words[0]}").make_parser(), words[1:])


def parse(parser, words):
    """With the parser of a program; of a recipe only whether its keys are options."""
    words = list(words)
    if isinstance(parser, TrlParser):
        if "--config" in words:
            at = words.index("--config")
            recipe = words[at + 1]
            del words[at : at + 2]
            assert recipe in PLACEHOLDERS or (ROOT / recipe).exists(), recipe
            if (ROOT / recipe).exists():
                check_keys(parser, yaml.safe_load((ROOT / recipe).read_text()))
        for action in parser._actions:
            action.required = False  # may be in the recipe
    _, unknown = parser.parse_known_args(words)
    assert not unknown, f"no such options: {unknown}"


def check_keys(parser, recipe):
    known = {action.dest for action in parser._actions}
    assert set(recipe) <= known, f"no such options: {sorted(set(recipe) - known)}"


def check_launcher(parser, words):
    parsed = parser.parse_args(words)
    config = getattr(parsed, "config_file", None)
    assert config is None or (ROOT / config).is_file(), config
    module = ["-m"] if parsed.module else []
    check_python([*module, parsed.training_script, *parsed.training_script_args])


def check_python(words):
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m" and words[1].startswith("trl_distreward.scripts."):
        check_cli([words[1].rpartition(".")[2], *words[2:]])
    elif words[0] == "-m":
        assert words[1] == "pytest"
        for word in words[2:]:
            markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
            assert word.startswith("-") or word in markers or (ROOT / word).exists(), word
    elif words[0] not in PLACEHOLDERS:
        check_script(ROOT / words[0], words[1:])


def check_script(path, words):
    """Runs a script as far as it reads its options."""
    read = ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    def stop_with_recipe(self, args=None, **kwargs):
        parse(self, sys.argv[1:] if args is None else args)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", stop)
        patch.setattr(TrlParser, "parse_args_and_config", stop_with_recipe)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def targets():
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_pip(words):
    assert words[0] == "install"
    for before, word in zip(words, words[1:], strict=False):
        if before == "-c":
            assert (ROOT / word).is_file(), word
        own = re.fullmatch(r"(?:\.|trl-distreward)\[([\w,]+)\]", word)
        if own:
            assert set(own[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"]), word


# ---- the tests ----


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: f"{block.page.name}-{block.number}")
def test_commands_of_the_docs_parse(block):
    found = commands(block.text)
    assert found
    for words in found:
        check(words)


def inline():
    found = {}
    for page in PAGES:
        for span in code_spans(page):
            words = re.sub(r"^(?:\w+=\S+ )+", "", span)
            # "…" stands for what the reader knows
            if words.startswith(tuple(f"{program} " for program in PROGRAMS)) and "…" not in words:
                found.setdefault(words, page)
    return found


def rest_of(words):
    """What a sentence leaves out: the script of a launcher, the files of a conversion."""
    if words[0] in ("accelerate", "torchrun") and not any(word.endswith(".py") for word in words):
        return ["train.py"]
    return ["original", "folder"] if words[:2] == ["trl-distreward", "convert"] and len(words) == 3 else []


@pytest.mark.parametrize("command", sorted(inline()))
def test_commands_within_sentences_parse(command):
    for words in commands(command):
        check([*words, *rest_of(words)])


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page.name}-{block.number}")
def test_recipes_of_the_docs_are_known(block):
    recipe, misfits = yaml.safe_load(block.text), []
    for command in ("train", "merge"):
        parser = import_module(f"trl_distreward.scripts.{command}").make_parser()
        try:
            check_keys(parser, recipe)
        except AssertionError as error:
            misfits.append(str(error))
    assert len(misfits) < 2, misfits


def test_a_wrong_command_is_noticed():
    wrong = [
        "trl-distreward trian --config recipe.yaml",
        "trl-distreward train --config recipe.yaml --learnign_rate 1",
        "trl-distreward evaluate --compare a.json",
        "python examples/digits.py --sede 0",
        "python examples/digit.py",
        "accelerate launch --config_file examples/accelerate_configs/fsdp3.yaml train.py",
        "torchrun --nproc 8 train.py",
        "make dmeo",
        'pip install "trl-distreward[od]"',
        "rm -rf /",
    ]
    for line in wrong:
        with pytest.raises((AssertionError, SystemExit, FileNotFoundError)):
            check(*commands(line))


def test_a_shell_is_understood():
    loop = "for x in p q; do\n    run $common \\\n  --to $x.json  # why\ndone\n"
    text = f'common="--real a b\n    --spread 2"\n{loop}A=1 end'
    assert commands(text) == [["run", "--real", "a", "b", "--spread", "2", "--to", "p.json"], ["end"]]


def test_every_script_is_named_on_a_page():
    """A benchmark that no page tells of is not found."""
    told = "\n".join(page.read_text() for page in PAGES)
    helpers = {"runs.py", "results.py", "mnist.py"}
    for path in sorted([*Path(ROOT / "examples").glob("*.py"), *Path(ROOT / "benchmarks").glob("*.py")]):
        assert path.name in helpers or path.name in told, path
