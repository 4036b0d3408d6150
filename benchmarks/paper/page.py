# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Tables and plots of the documentation, from the result files.

A table goes between the comments `<!-- table NAME DATA -->` and `<!-- end -->` of a page.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results import Row, markdown  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARK = re.compile(r"<!-- table (\w+) (\w+) -->\n.*?<!-- end -->", re.DOTALL)
TARGET = 0.7  # of the base's held-out distance
ABLATIONS = {  # drawn side by side, as in the paper
    "Fig. 3a: reference set": "reference_size",
    "Fig. 3b: images of a subset": "subset_size",
    "Fig. 3c: trained on": "selection",
    "Fig. 4a: normalized over": "normalization",
    "Fig. 4c: stages": "stages",
    "Fig. 5: refreshed": "refresh",
}
# Metric and format of each column; "%" shows the change from the base with its interval
COLUMNS = {
    "rate": ("learning_rate", "g"),
    "images": ("images", ",.0f"),
    "network evaluations": ("evaluations", ",.0f"),
    "seconds": ("seconds", ".0f"),
    "MiB held": ("held_mib", ".0f"),
    "held-out, ODE": ("fd_heldout ode", "%"),
    "held-out, SDE": ("fd_heldout sde", "%"),
    "pixel, ODE": ("fd_pixel ode", "%"),
    "accuracy, ODE": ("accuracy ode", ".3f"),
    "EfficientNet": ("fd_efficientnet ode", "%"),
    "pixel, unseen": ("fd_unseen_pixels ode", "%"),
    "mean colour off": ("colour_shift ode", ".3f"),
    "recall": ("recall ode", ".3f"),
    "coverage": ("coverage ode", ".3f"),
    "precision": ("precision ode", ".3f"),
    "log-odds": ("log_odds ode", ".2f"),
}
ARMS = ("rate", "images", "held-out, ODE", "held-out, SDE", "pixel, ODE", "accuracy, ODE")
TABLE_4 = {  # with the paper's changes
    "fd_heldout": ("Fréchet distance", "FID -30.5%"),
    "kernel": ("kernel distance", "KID -53.5%"),
    "mmd": ("MMD", "-48.3%"),
    "fd_autoencoder": ("Fréchet distance, autoencoder", "FD-DINOv2 -28.5%"),
    "precision": ("precision", "+4.3%"),
    "recall": ("recall", "-3.5%"),
    "density": ("density", "+12.0%"),
    "coverage": ("coverage", "+2.9%"),
}


class Results:
    """A result file, by arm and metric."""

    def __init__(self, folder: Path, name: str, data: str):
        content = json.loads((folder / f"{name}_{data}.json").read_text())
        self.seeds: list[int] = content["seeds"]
        self.rows: dict[tuple[str, str], Row] = {(row["arm"], row["metric"]): row for row in content["rows"]}
        self.arms = list(dict.fromkeys(arm for arm, _ in self.rows))
        self.trained = [arm for arm in self.arms if arm != "base"]
        steps = [metric.split()[2] for _, metric in self.rows if metric.count(" ") == 2]
        self.end = f" {max(steps, key=int)}" if steps else ""  # of metrics at the most steps

    def mean(self, arm: str, metric: str, form: str = ".2f") -> str:
        return format(self.rows[arm, metric]["mean"], form)

    def change(self, arm: str, metric: str) -> str:
        mean, low, high = self.rows[arm, metric]["change"]
        return f"{mean:+.0f}%" + (f" [{low:+.0f}, {high:+.0f}]" if len(self.seeds) > 1 else "")

    def cell(self, arm: str, column: str) -> str:
        metric, form = COLUMNS[column]
        metric += self.end if " " in metric else ""
        if arm == "base" and metric in ("learning_rate", "seconds", "held_mib"):
            return ""
        if form == "%":
            return self.mean(arm, metric) if arm == "base" else self.change(arm, metric)
        return self.mean(arm, metric, form)


def arms_table(results: Results, columns: Sequence[str] = ARMS) -> str:
    """A row for each arm: changes from the base, and means."""
    rows = [[arm, *(results.cell(arm, column) for column in columns)] for arm in results.arms]
    return markdown(["", *columns], rows)


def metrics_table(results: Results) -> str:
    """Table 4: changes of metrics that no reward uses, under the SDE."""
    rows = []
    for key, (title, published) in TABLE_4.items():
        cells = [results.change(arm, f"{key} sde 50") for arm in results.trained]
        rows.append([title, results.mean("base", f"{key} sde 50", ".3g"), *cells, published])
    return markdown(["", "base", *results.trained, "paper's"], rows)


def target_table(results: Results) -> str:
    """Images until the held-out distance under the ODE is 30% lower, for each seed."""
    rows = []
    for arm in results.trained:
        reached = results.rows[arm, "fd_heldout ode 50"]["to_target"]
        rows.append([arm, *("never" if count is None else f"{count:,.0f}" for count in reached)])
    return markdown(["", *(f"seed {seed}" for seed in results.seeds)], rows)


def cost_table(results: Results) -> str:
    """Table 6: shares of a training step by phase."""
    phases = ("refresh", "reward", "rollout", "training")
    rows = [[phase, *(results.mean(arm, f"share/{phase}", ".1%") for arm in results.trained)] for phase in phases]
    return markdown(["", *results.trained], rows)


def spread_table(results: Results) -> str:
    """Table 5: coefficients of variation of rewards."""
    sizes = [metric for _, metric in results.rows]
    found = [results.rows["spread", size] for size in sizes]
    cells = [f"{row['mean']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" for row in found]
    return markdown(["n", *sizes], [["CV, %", *cells]])


def of_columns(*columns: str) -> Callable[[Results], str]:
    return partial(arms_table, columns=columns)


TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "table_1": ("training", arms_table),
    "table_4": ("training", metrics_table),
    "table_5": ("reward_spread", spread_table),
    "table_6": ("training", cost_table),
    "target": ("training", target_table),
    "figure_1": (
        "sample_wise",
        of_columns("rate", "held-out, ODE", "recall", "coverage", "precision", "log-odds", "accuracy, ODE"),
    ),
    "figure_3b": ("subset_size", arms_table),
    "noise": ("noise", of_columns("held-out, ODE", "seconds")),
    "parts": ("parts", of_columns("held-out, ODE", "accuracy, ODE")),
    "forward_process": ("forward_process", of_columns("seconds", *ARMS[2:])),
    "colour": (
        "colour",
        of_columns("images", "held-out, ODE", "EfficientNet", "pixel, unseen", "mean colour off", "accuracy, ODE"),
    ),
    "estimators": (
        "estimators",
        of_columns("images", "network evaluations", "seconds", "MiB held", *ARMS[2:]),
    ),
}


def pages() -> list[Path]:
    """Pages with tables to fill."""
    return [path for path in sorted(DOCS.rglob("*.md")) if MARK.search(path.read_text())]


def filled(text: str, folder: Path) -> str:
    """The page with all tables from the results."""

    def fill(match: re.Match) -> str:
        name, data = match.groups()
        source, build = TABLES[name]
        return f"<!-- table {name} {data} -->\n\n{build(Results(folder, source, data))}\n\n<!-- end -->"

    return MARK.sub(fill, text)


def draw_training(results: Results, path: Path) -> None:
    """Held-out distance over images, as a share of the base's: mean and interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, sampler in zip(axes, ("sde", "ode"), strict=True):
        for arm in results.trained:
            row = results.rows[arm, f"fd_heldout {sampler} 50"]
            means, low, high = zip(*row["shares"], strict=True)
            (line,) = axis.plot(row["images"], means, marker="o", markersize=3, label=arm)
            axis.fill_between(row["images"], low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(TARGET, color="gray", linewidth=1, linestyle="--")
        axis.set(title=f"{sampler.upper()}, 50 steps", xlabel="images generated", ylim=(0, 2))
    axes[0].set_ylabel("held-out distance, share of the base's")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def draw_arms(panels: dict[str, Results], path: Path) -> None:
    """Change of the held-out distance by arm, a panel for each experiment: mean and interval."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    arms = [max(len(results.arms) for results in list(panels.values())[2 * i : 2 * i + 2]) for i in range(rows)]
    figure = Figure(figsize=(10, sum(0.3 * count + 0.6 for count in arms)), layout="constrained")
    axes: Any = figure.subplots(rows, 2, sharex=True, squeeze=False, height_ratios=arms).flatten()
    for axis, (title, results) in zip(axes, panels.items(), strict=False):
        names = results.trained
        for row, arm in enumerate(names):
            for sampler, shift, color in (("ode", -0.14, "C3"), ("sde", 0.14, "C0")):
                mean, low, high = results.rows[arm, f"fd_heldout {sampler}"]["change"]
                label = sampler.upper() if row == 0 else None
                axis.hlines(row + shift, low, high, color=color, linewidth=1.5)
                axis.plot(mean, row + shift, "o", color=color, markersize=4, label=label)
        axis.axvline(0, color="gray", linewidth=1)
        axis.set_yticks(range(len(names)), [textwrap.fill(name, 24) for name in names])
        axis.set_title(title, loc="left")
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(panels) - 2 :]:
        axis.set_xlabel("held-out distance, change from the base in %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=100)


def write_page(folder: Path) -> None:
    """Fills the tables of all pages and draws the plots."""
    for path in pages():
        path.write_text(filled(path.read_text(), folder))
    for data in ("digits", "mnist"):
        draw_training(Results(folder, "training", data), DOCS / "results" / "images" / f"training_{data}.png")
    panels = {title: Results(folder, name, "digits") for title, name in ABLATIONS.items()}
    draw_arms(panels, DOCS / "results" / "images" / "ablations_digits.png")
