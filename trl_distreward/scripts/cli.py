# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
usage: trl-distreward COMMAND [OPTIONS]

Commands:
  convert     make pipelines of original SiT and EDM2 checkpoints
  statistics  compute the statistics of a set of real images
  train       fine-tune a pipeline on distribution-wise rewards
  merge       learn with which coefficients to merge checkpoints
  evaluate    measure how far generated images are from real ones
  report      write a run as one HTML file

trl-distreward COMMAND --help shows a command's options, trl-distreward --version what is installed. What is wrong with
the options, files or repositories of a command is told in a line; with TRL_DISTREWARD_TRACEBACK=1 in the environment,
with where in the code it was noticed.
"""

import linecache
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module

from yaml import YAMLError

from .. import __version__

# Modules that say what is wrong with what they were given; the same errors of others are faults, and keep their trace.
_OURS = (
    "trl_distreward.",
    "trl.scripts.",
    "transformers.hf_argparser.",
    "transformers.trainer.",
    "transformers.training_args.",
    "transformers.utils.generic.",
)
_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, OSError, YAMLError)
COMMANDS = ("convert", "statistics", "train", "merge", "evaluate", "report")


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if arguments == ["--version"]:
        print(f"trl-distreward {__version__}")
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"trl-distreward: no command {arguments[0]!r}; there is: {', '.join(COMMANDS)}.")
    command = import_module(f"trl_distreward.scripts.{arguments[0]}")
    run(f"trl-distreward {arguments[0]}", command.main, arguments[1:])


def run(name: str, command: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Runs a command; errors of use end it with a line that starts with its name."""
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except _ERRORS as error:
        if not is_of_use(error) or os.environ.get("TRL_DISTREWARD_TRACEBACK"):
            raise
        sys.exit(f"{name}: {error}")


def is_of_use(error: Exception) -> bool:
    """Whether an error's message says all: of a `raise` of ours, of a file that it names, or of YAML."""
    if isinstance(error, YAMLError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    ours = f"{frame.f_globals.get('__name__')}.".startswith(_OURS)
    return ours and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")


if __name__ == "__main__":
    main()
