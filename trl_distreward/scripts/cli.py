# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
usage: trl-distreward COMMAND [OPTIONS]

Commands:
  convert     make pipelines from original SiT and EDM2 checkpoints
  statistics  compute the statistics of a set of real images
  train       fine-tune a pipeline with distribution-wise rewards
  merge       learn the coefficients with which checkpoints are merged
  evaluate    measure how far generated images are from real ones
  report      write an HTML page of a run

`trl-distreward COMMAND --help` shows the options of a command, `trl-distreward --version` the version. Errors are
printed in one line; with --debug a command shows where they were raised.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from yaml import YAMLError

from .. import __version__

COMMANDS = ("convert", "statistics", "train", "merge", "evaluate", "report")
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
    elif name == "--version":
        print(f"trl-distreward {__version__}")
    elif name in COMMANDS:
        run(f"trl-distreward {name}", import_module(f"trl_distreward.scripts.{name}").main, arguments)
    else:
        sys.exit(f"trl-distreward: no command {name!r}; choose one of {', '.join(COMMANDS)}.")


def run(name: str, command: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Runs a command; prints the errors that options, files and missing packages cause in one line."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        command([argument for argument in given if argument != "--debug"])
    except (ValueError, OSError, ImportError, YAMLError) as error:
        if "--debug" in given:
            raise
        sys.exit(f"{name}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted.")


class Parser(argparse.ArgumentParser):
    """Raises `ValueError` where argparse would print its usage and exit, and names options that are nearly right."""

    def parse_known_args(  # type: ignore[override]
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the command's own parser checks them
            names = [argument.partition("=")[0] for argument in given if argument[:2] == "--" != argument]
            refuse_unknown(names, self._option_string_actions)
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help.")


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ValueError` for the names that are not known, each with the nearest that is."""
    bare, errors = {option.lstrip("-"): None for option in known}, []
    for name in names:
        word = name.lstrip("-")
        if word not in bare:
            dashes, nearest = name.removesuffix(word), get_close_matches(word, bare, n=1)
            remedy = f"did you mean {dashes}{nearest[0]}?" if nearest else "no such option, see --help."
            errors.append(f"{name}: {remedy}")
    if errors:
        raise ValueError(" ".join(errors))


def make_parser(command: str, description: str | None) -> Parser:
    """Returns a parser that shows the module's docstring as it is written."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return Parser(f"trl-distreward {command}", description=description, **style)
