# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Result files: one compact JSON a table, one row a line. The runs behind it stay in a log that git ignores."""

import json
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Runs = dict[str, list[dict[str, Any]]]  # by arm, one entry per seed
Row = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean, over all resamples of up to six values and 10,000 resamples of more."""
    sample = np.array(values)
    if len(sample) <= 6:
        means = np.array(list(product(sample, repeat=len(sample)))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(sample, (10_000, len(sample))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mean_and_interval(values: Sequence[float]) -> list[float]:
    """Mean, low and high, rounded."""
    return rounded([float(np.mean(values)), *interval(values)])


def summarize(runs: Runs) -> list[Row]:
    """
    Rows of a table: for each arm and metric the mean over seeds with its interval.

    Metrics of an evaluation have a space in their names. For these, `change` is the mean change from the arm `base` in
    percent, with its interval, of runs with the same seed.
    """
    rows = []
    for arm, results in runs.items():
        for metric, value in results[0].items():
            if metric == "seed" or not isinstance(value, int | float):
                continue
            values = [run[metric] for run in results]
            low_and_high = mean_and_interval(values)[1:]
            row: Row = {"arm": arm, "metric": metric, "mean": float(np.mean(values)), "interval": low_and_high}
            if " " in metric and arm != "base" and "base" in runs:
                pairs = zip(values, runs["base"], strict=True)
                row["change"] = mean_and_interval([100 * (value / base[metric] - 1) for value, base in pairs])
            rows.append(row)
    return rows


def rounded(value: Any, digits: int = 6) -> Any:
    """Rounds all numbers to significant digits; numbers that are not finite become `None`."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def write_table(path: Path, rows: Iterable[Row], packages: Sequence[str] = ("torch",), **header: Any) -> None:
    """Writes the command, the versions, `header` and the rows."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    header = {"command": " ".join(["python", *sys.argv]), "versions": versions, **header}
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in header.items()]
    table = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, f'"rows": [\n{table}\n]', "}\n"]))


def append_run(log: Path, arm: str, seed: int, result: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps({"arm": arm, "seed": seed, **result}) + "\n")


def read_runs(log: Path) -> Runs:
    """Runs of a log by arm, in the order of seeds."""
    runs: Runs = {}
    for line in log.read_text().splitlines() if log.is_file() else []:
        run = json.loads(line)
        runs.setdefault(run.pop("arm"), []).append(run)
    return {arm: sorted(results, key=lambda run: run["seed"]) for arm, results in runs.items()}


def complete(runs: Runs) -> Runs:
    """Only the seeds that all arms have."""
    seeds = set.intersection(*({run["seed"] for run in results} for results in runs.values()))
    return {arm: [run for run in results if run["seed"] in seeds] for arm, results in runs.items()}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
