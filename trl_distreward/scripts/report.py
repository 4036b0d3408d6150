# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Writes a run as one HTML file that opens in any browser, offline: evaluations, samples before and after, rewards,
updates, cost, configuration and versions.

    trl-distreward report sit-distreward
    trl-distreward report merged --output merged.html

RUN_DIR is the output_dir of a training or of a merge. Its run.json is kept up to date from the first update on, so the
run may still go on, or have been interrupted.
"""

import argparse

from ..run_report import write_report
from . import cli


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-distreward report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="The run's output_dir.")
    parser.add_argument("--output", metavar="FILE", help="The file to write (default: RUN_DIR/report.html).")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    path = write_report(arguments.run_dir, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, opens in any browser.")


if __name__ == "__main__":
    cli.run("python -m trl_distreward.scripts.report", main)
