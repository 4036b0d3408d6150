# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
usage: trl-distreward COMMAND [OPTIONS]

Commands:
  convert     make pipelines of original SiT and EDM2 checkpoints
  statistics  compute the statistics of a set of real images
  train       fine-tune a pipeline on distribution-wise rewards
  merge       learn with which coefficients to merge checkpoints
  evaluate    measure how far generated images are from real ones

trl-distreward COMMAND --help shows a command's options.
"""

import sys
from importlib import import_module

COMMANDS = ("convert", "statistics", "train", "merge", "evaluate")


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"trl-distreward: no command {arguments[0]!r}; there is: {', '.join(COMMANDS)}.")
    import_module(f"trl_distreward.scripts.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main()
