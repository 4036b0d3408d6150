# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The table of an experiment, from its runs."""

from typing import Any

import numpy as np
from results import Row, Runs, mean_and_interval, rounded, summarize

PLAIN = ("fd_heldout", "fd_pixel", "accuracy")
REFERENCE_SET = 1000  # images
TARGET = 0.7  # of the base's held-out distance: the paper's margin, 8.30 to 5.77


def rows_of(runs: Runs) -> list[Row]:
    """
    Rows of [`summarize`] for the metrics that tables show.

    A held-out distance that was evaluated during training has more columns: mean `images` and mean distances (`curve`)
    by evaluation, `shares` of the base's distance with intervals, and [`images_to_target`] by seed (`to_target`).
    """
    rows = summarize({arm: [_flat(run) for run in results] for arm, results in runs.items()})
    for row in rows:
        if row["metric"].startswith("fd_heldout") and runs[row["arm"]][0].get("curve"):
            row |= _curve_columns(runs, row["arm"], row["metric"])
    return rows


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """Values to summarize. Of several numbers of steps, only distances and accuracy are kept at all of them."""
    most = max((key.split()[2] for key in run if len(key.split()) == 3), key=int, default="")
    left_out = ("distance_",) if run.get("curve") is not None else ("distance_", "fd_reward")
    kept = {
        key: value
        for key, value in run.items()
        if " " not in key or key.startswith(PLAIN) or (key.endswith(most) and not key.startswith(left_out))
    }
    phases = run.get("phases") or {} if run.get("curve") else {}
    return kept | {f"share/{phase}": seconds / sum(phases.values()) for phase, seconds in phases.items()}


def curve_of(runs: Runs, arm: str, index: int) -> tuple[list[float], list[dict[str, float]]]:
    """Images and evaluations of one run, starting with the base."""
    run, base = runs[arm][index], runs["base"][index]
    points = [{**base, "images": 0}, *run["curve"], run]
    return [point["images"] for point in points], points


def images_to_target(runs: Runs, arm: str, metric: str) -> list[float | None]:
    """
    Images after which the distance of each run is 30% below that of its base, interpolated; `None` if it never is.

    The first reference set is generated before any training.
    """
    found: list[float | None] = []
    for i in range(len(runs[arm])):
        images, points = curve_of(runs, arm, i)
        images = [REFERENCE_SET, *images[1:]]
        values = [point[metric] / points[0][metric] for point in points]
        reached = None
        for k in range(1, len(values)):
            if values[k] <= TARGET:
                share = (values[k - 1] - TARGET) / (values[k - 1] - values[k])
                reached = images[k - 1] + share * (images[k] - images[k - 1])
                break
        found.append(reached)
    return found


def _curve_columns(runs: Runs, arm: str, metric: str) -> Row:
    curves = [curve_of(runs, arm, i) for i in range(len(runs[arm]))]
    values = np.array([[point[metric] for point in points] for _, points in curves])  # (seeds, evaluations)
    shares = values / values[:, :1]
    return {
        "images": rounded(np.mean([images for images, _ in curves], axis=0).tolist()),
        "curve": rounded(values.mean(axis=0).tolist()),
        "shares": [mean_and_interval(column) for column in shares.T.tolist()],
        "to_target": rounded(images_to_target(runs, arm, metric)),
    }
