# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Tables and plots of what was measured, into the docs: a comment `<!-- table NAME DATA -->` is followed by that table,
up to `<!-- end -->`. `<!-- table table_3 DATA ARM -->` names an arm.
"""

import json
import math
import re
import textwrap
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Runs = dict[str, list[dict[str, Any]]]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "source"
MARK = re.compile(r"<!-- table (\w+) (\w+)(?: ([\w ]+))? -->\n.*?<!-- end -->", re.DOTALL)
REFERENCE_SET = 1000  # images
TARGET = 0.7  # of the base's held-out distance: the paper's margin, 8.30 to 5.77
ABLATIONS = {  # drawn beside each other, as in the paper
    "Fig. 3a: reference set": "reference_size",
    "Fig. 3b: images of a subset": "subset_size",
    "Fig. 3c: trained on": "selection",
    "Fig. 4a: normalized over": "normalization",
    "Fig. 4c: stages": "stages",
    "Fig. 5: set made anew": "refresh",
}
TABLE_4 = {  # of the paper, in percent
    "fd_heldout": ("Fréchet distance", "FID -30.5%"),
    "kernel": ("kernel distance", "KID -53.5%"),
    "mmd": ("MMD", "-48.3%"),
    "fd_autoencoder": ("Fréchet distance, autoencoder", "FD-DINOv2 -28.5%"),
    "precision": ("precision", "+4.3%"),
    "recall": ("recall", "-3.5%"),
    "density": ("density", "+12.0%"),
    "coverage": ("coverage", "+2.9%"),
}


def load(folder: Path, name: str, data: str) -> Runs:
    runs: Runs = json.loads((folder / f"{name}_{data}.json").read_text())["runs"]
    seeds = [{run["seed"] for run in results} for results in runs.values()]
    common = set.intersection(*seeds)  # an experiment under way
    return {
        arm: sorted((run for run in results if run["seed"] in common), key=lambda run: run["seed"])
        for arm, results in runs.items()
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean: all resamples of up to six values, 10,000 of more."""
    sample = np.array(values)
    if len(sample) <= 6:
        means = np.array(list(product(sample, repeat=len(sample)))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(sample, (10_000, len(sample))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def changes(runs: Runs, arm: str, key: str) -> list[float]:
    return [100 * (run[key] / base[key] - 1) for run, base in zip(runs[arm], runs["base"], strict=True)]


def change(runs: Runs, arm: str, key: str) -> str:
    values = changes(runs, arm, key)
    low, high = interval(values)
    return f"{np.mean(values):+.0f}% [{low:+.0f}, {high:+.0f}]"


def mean(runs: Runs, arm: str, key: str, form: str = ".2f") -> str:
    return format(float(np.mean([run[key] for run in runs[arm]])), form)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def arms_table(runs: Runs) -> str:
    """Held-out and pixel distances of every arm against the base."""
    steps = max((key.split()[2] for key in runs["base"][0] if key.startswith("fd_heldout ode ")), default="")
    end = f" {steps}" if steps else ""
    rows = []
    for arm in runs:
        keys = [f"fd_heldout ode{end}", f"fd_heldout sde{end}", f"fd_pixel ode{end}"]
        if arm == "base":
            cells = ["", "0", *(mean(runs, arm, key) for key in keys)]
        else:
            cells = [mean(runs, arm, "learning_rate", "g"), mean(runs, arm, "images", ",.0f")]
            cells += [change(runs, arm, key) for key in keys]
        rows.append([arm, *cells, mean(runs, arm, f"accuracy ode{end}", ".3f")])
    header = ["", "rate", "images", "held-out, ODE", "held-out, SDE", "pixel, ODE", "accuracy, ODE"]
    return markdown(header, rows)


def metrics_table(runs: Runs) -> str:
    """Table 4: every metric that no reward sees, as a change from the base."""
    arms = [arm for arm in runs if arm != "base"]
    rows = []
    for key, (title, published) in TABLE_4.items():
        for sampler in ("sde", "ode"):
            cells = [change(runs, arm, f"{key} {sampler} 50") for arm in arms]
            base = mean(runs, "base", f"{key} {sampler} 50", ".3g")
            rows.append([f"{title}, {sampler.upper()}", base, *cells, published if sampler == "sde" else ""])
    return markdown(["", "base", *arms, "the paper's"], rows)


def curve_of(runs: Runs, arm: str, index: int) -> tuple[list[float], list[dict[str, float]]]:
    """Images and evaluations of one run from the base on."""
    run, base = runs[arm][index], runs["base"][index]
    points = [{**base, "images": 0}, *run["curve"], run]
    return [point["images"] for point in points], points


def schedule_table(runs: Runs, arm: str) -> str:
    """Table 3: the training schedule beside the evaluation schedule, over training."""
    curves = [curve_of(runs, arm, i) for i in range(len(runs[arm]))]
    rows = []
    for sampler in ("sde", "ode"):
        for steps in (10, 50):
            values = [[point[f"fd_heldout {sampler} {steps}"] for point in points] for _, points in curves]
            means = np.mean(values, axis=0)
            rows.append([f"{sampler.upper()}, {steps} steps", *(f"{value:.2f}" for value in means)])
    images = np.mean([images for images, _ in curves], axis=0)
    return markdown(["images", *(f"{count:,.0f}" for count in images)], rows)


def images_to_target(runs: Runs, arm: str, key: str) -> list[float]:
    """
    Images after which each run's distance is 30% below its base's, interpolated; infinite if it never is. The first
    reference set is made before anything is trained.
    """
    found = []
    for i in range(len(runs[arm])):
        images, points = curve_of(runs, arm, i)
        images = [REFERENCE_SET, *images[1:]]
        values = [point[key] / points[0][key] for point in points]
        reached = float("inf")
        for k in range(1, len(values)):
            if values[k] <= TARGET:
                share = (values[k - 1] - TARGET) / (values[k - 1] - values[k])
                reached = images[k - 1] + share * (images[k] - images[k - 1])
                break
        found.append(reached)
    return found


def target_table(runs: Runs) -> str:
    """Images until the held-out distance is 30% down, per seed."""
    rows = []
    for arm in runs:
        if arm == "base":
            continue
        for sampler in ("ode", "sde"):
            reached = images_to_target(runs, arm, f"fd_heldout {sampler} 50")
            cells = [f"{count:,.0f}" if np.isfinite(count) else "never" for count in reached]
            rows.append([f"{arm}, {sampler.upper()}", *cells])
    return markdown(["", *(f"seed {run['seed']}" for run in runs["base"])], rows)


def gap_table(runs: Runs) -> str:
    """Fig. 4b: of the SDE's relative gain, what the ODE keeps; per image generated, and what the training took."""
    end = " 50" if "fd_heldout ode 50" in runs["base"][0] else ""
    rows = []
    for arm in runs:
        if arm == "base":
            continue
        keys = {sampler: f"fd_heldout {sampler}{end}" for sampler in ("sde", "ode")}
        gains = {sampler: -np.mean(changes(runs, arm, key)) for sampler, key in keys.items()}
        per_image = gains["ode"] / float(mean(runs, arm, "images", "f")) * 1000
        certain = interval(changes(runs, arm, keys["sde"]))[1] < 0
        kept = f"{gains['ode'] / gains['sde']:.0%}" if certain else ""
        seconds = mean(runs, arm, "seconds", ".0f")
        rows.append([arm, *(change(runs, arm, key) for key in keys.values()), kept, f"{per_image:.1f}", seconds])
    return markdown(["", "SDE", "ODE", "kept", "ODE, points per 1,000 images", "seconds"], rows)


def ode_table(runs: Runs) -> str:
    """Arms that differ in the SDE they sample with, by what they do under the ODE, which is the same for all."""
    rows = []
    for arm in runs:
        keys = ["fd_heldout ode", "fd_pixel ode"]
        cells = [change(runs, arm, key) if arm != "base" else mean(runs, arm, key) for key in keys]
        seconds = mean(runs, arm, "seconds", ".0f") if arm != "base" else ""
        rows.append([arm, *cells, mean(runs, arm, "accuracy ode", ".3f"), seconds])
    return markdown(["", "held-out, ODE", "pixel, ODE", "accuracy, ODE", "seconds"], rows)


def cost_table(runs: Runs) -> str:
    """Table 6: shares of a training step by phase."""
    arms = [arm for arm in runs if arm != "base"]
    names = sorted({key for arm in arms for run in runs[arm] for key in run["phases"]})
    rows = []
    for name in names:
        cells = []
        for arm in arms:
            shares = [run["phases"].get(name, 0.0) / sum(run["phases"].values()) for run in runs[arm]]
            cells.append(f"{np.mean(shares):.1%}")
        rows.append([name.removeprefix("seconds/"), *cells])
    return markdown(["", *arms], rows)


def spread_table(runs: Runs) -> str:
    """Table 5: coefficients of variation of rewards."""
    results = runs["spread"]
    sizes = sorted(int(key.split("_")[-1]) for key in results[0] if key.startswith("cv_percent/"))
    cells = []
    for size in sizes:
        values = [run[f"cv_percent/n_{size}"] for run in results]
        low, high = interval(values)
        cells.append(f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]")
    return markdown(["n", *map(str, sizes)], [["CV of the reward, %", *cells]])


def sample_wise_table(runs: Runs) -> str:
    """Fig. 1: what is paid for beside what is lost."""
    keys = {
        "fd_heldout": "held-out distance",
        "recall": "recall",
        "coverage": "coverage",
        "precision": "precision",
        "log_odds": "log-odds",
        "accuracy": "accuracy",
    }
    rows = []
    for arm in runs:
        cells = [mean(runs, arm, f"{key} ode", ".3g") for key in keys]
        if arm != "base":
            cells[0] = f"{cells[0]} ({change(runs, arm, 'fd_heldout ode')})"
        rows.append([arm, "" if arm == "base" else mean(runs, arm, "learning_rate", "g"), *cells])
    return markdown(["", "rate", *keys.values()], rows)


TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "table_1": ("training", arms_table),
    "table_3": ("training", schedule_table),
    "table_4": ("training", metrics_table),
    "table_5": ("reward_spread", spread_table),
    "table_6": ("training", cost_table),
    "target": ("training", target_table),
    "figure_1": ("sample_wise", sample_wise_table),
    "figure_3a": ("reference_size", arms_table),
    "figure_3a_updates": ("reference_updates", arms_table),
    "figure_3b": ("subset_size", arms_table),
    "figure_3c": ("selection", arms_table),
    "figure_4a": ("normalization", arms_table),
    "figure_4b": ("training", gap_table),
    "figure_4c": ("stages", arms_table),
    "figure_5": ("refresh", arms_table),
    "rejection": ("rejection", arms_table),
    "noise": ("noise", ode_table),
    "recipe": ("recipe", arms_table),
}


def pages() -> list[Path]:
    """Those with tables to fill."""
    return [path for path in sorted(DOCS.glob("*.md")) if MARK.search(path.read_text())]


def asked(text: str) -> list[tuple[str, str]]:
    """Tables of a page and the data they are of."""
    return [(match[1], match[2]) for match in MARK.finditer(text)]


def filled(text: str, folder: Path) -> str:
    """The page with every table as the results have it."""

    def fill(match: re.Match) -> str:
        name, data, arm = match.groups()
        source, build = TABLES[name]
        made = build(load(folder, source, data), *([arm] if arm else []))
        return f"<!-- table {' '.join(filter(None, match.groups()))} -->\n\n{made}\n\n<!-- end -->"

    return MARK.sub(fill, text)


def draw_training(runs: Runs, path: Path) -> None:
    """Held-out distance over images, as a share of the base's: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, sampler in zip(axes, ("sde", "ode"), strict=True):
        for arm in runs:
            if arm == "base":
                continue
            curves = [curve_of(runs, arm, i) for i in range(len(runs[arm]))]
            key = f"fd_heldout {sampler} 50"
            shares = np.array([[point[key] / points[0][key] for point in points] for _, points in curves])
            images = np.mean([images for images, _ in curves], axis=0)
            (line,) = axis.plot(images, shares.mean(axis=0), marker="o", markersize=3, label=arm)
            axis.fill_between(images, shares.min(axis=0), shares.max(axis=0), color=line.get_color(), alpha=0.15)
        axis.axhline(TARGET, color="gray", linewidth=1, linestyle="--")
        axis.set(title=f"{sampler.upper()}, 50 steps", xlabel="images generated", ylim=(0, 2))
    axes[0].set_ylabel("held-out distance, share of the base's")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def draw_arms(panels: dict[str, Runs], path: Path) -> None:
    """Change of the held-out distance by arm, a panel an experiment: every seed, the mean and its interval."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    arms = [max(len(runs) for runs in list(panels.values())[2 * i : 2 * i + 2]) for i in range(rows)]
    figure = Figure(figsize=(10, sum(0.3 * count + 0.6 for count in arms)), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False, height_ratios=arms).flatten()
    for axis, (title, runs) in zip(axes, panels.items(), strict=False):
        names = [arm for arm in runs if arm != "base"]
        for row, arm in enumerate(names):
            for sampler, shift, color in (("ode", -0.14, "C3"), ("sde", 0.14, "C0")):
                values = changes(runs, arm, f"fd_heldout {sampler}")
                low, high = interval(values)
                axis.plot(values, [row + shift] * len(values), ".", color=color, alpha=0.35, markersize=4)
                label = sampler.upper() if row == 0 else None
                axis.hlines(row + shift, low, high, color=color, linewidth=1.5)
                axis.plot(np.mean(values), row + shift, "o", color=color, markersize=4, label=label)
        axis.axvline(0, color="gray", linewidth=1)
        axis.set_yticks(range(len(names)), [textwrap.fill(name, 24) for name in names])
        axis.set_title(title, loc="left")
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis in axes[max(0, len(panels) - 2) : len(panels)]:
        axis.set_xlabel("held-out distance, change from the base in %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=100)


def write_page(folder: Path) -> None:
    """Fills every page's tables, and draws the plots beside them."""
    for path in pages():
        path.write_text(filled(path.read_text(), folder))
    (DOCS / "images").mkdir(exist_ok=True)
    for data in ("digits", "mnist"):
        if (folder / f"training_{data}.json").is_file():
            draw_training(load(folder, "training", data), DOCS / "images" / f"training_{data}.png")
    panels = {
        title: load(folder, name, "digits")
        for title, name in ABLATIONS.items()
        if (folder / f"{name}_digits.json").is_file()
    }
    if panels:
        draw_arms(panels, DOCS / "images" / "ablations_digits.png")
