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
printed in one line; set TRL_DISTREWARD_TRACEBACK=1 to see where they were raised.
"""

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

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
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError, ImportError, YAMLError) as error:
        if os.environ.get("TRL_DISTREWARD_TRACEBACK"):
            raise
        sys.exit(f"{name}: {' '.join(str(error).split())}")


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows the module's docstring as it is written."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(f"trl-distreward {command}", description=description, **style)


if __name__ == "__main__":
    main()
