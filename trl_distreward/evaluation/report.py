# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Tables of evaluations. A report is a dictionary: `model`, `images` (their number), `resize`, `settings` of the
generation, `library`, and `results`, one for each feature extractor: `extractor`, `resize`, `real` (`path`, `count`,
`mean_norm`) and `metrics`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

Report = Mapping[str, Any]

# names of metrics in the literature, by extractor and metric
_LITERATURE = {
    ("inception", "frechet"): "FID",
    ("inception", "frechet_infinity"): "FID∞",
    ("mean", "frechet_ratio"): "FDr^k",
    ("inception-spatial", "frechet"): "sFID",
    ("dinov2", "frechet"): "FD-DINOv2",
    ("clip", "cmmd"): "CMMD",
}


def check_comparable(before: Report, after: Report) -> None:
    """Raises `ValueError` if distances of the two reports cannot be compared."""
    for name in ("images", "resize"):
        if before[name] != after[name]:
            raise ValueError(f"the reports cannot be compared: their {name} are {before[name]} and {after[name]}.")
    norms = {result["extractor"]: result["real"]["mean_norm"] for result in before["results"]}
    for result in after["results"]:
        name, norm = result["extractor"], result["real"]["mean_norm"]
        if not math.isclose(norm, norms.get(name, norm), rel_tol=1e-4):
            raise ValueError(f"the reports cannot be compared: their real images differ, in the features of {name}.")


def markdown_table(*reports: Report) -> str:
    """Returns a table of the metrics that one or two reports share; of two, with the change in percent."""
    values = [_values(report) for report in reports]
    head = ["metric", "features", *(str(report["model"]) for report in reports), *["change"][: len(reports) - 1]]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for key, (first, _) in values[0].items():
        if all(key in each for each in values):
            extractor, resize, metric = key
            features = ", ".join(filter(None, dict.fromkeys((extractor, resize))))
            row = [_LITERATURE.get((extractor, metric), metric), features]
            for value, std in (each[key] for each in values):
                row.append(f"{value:.5g}" + (f" ± {std:.2g}" if std else ""))
            if len(reports) > 1:
                row.append(f"{100 * (values[1][key][0] - first) / abs(first):+.1f} %" if first else "undefined")
            rows.append(row)
    reals = {f"{Path(r['real']['path']).name} ({r['real']['count'] or '?'} images)": 0 for r in reports[0]["results"]}
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{reports[0]['images']:,} images. Real data: {', '.join(reals)}."])


def _values(report: Report) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """Values and standard deviations by extractor, resize and metric; of several spaces' ratios the mean (FDr^k)."""
    ratios = [result["metrics"].get("frechet_ratio") for result in report["results"]]
    mean = {("mean", "", "frechet_ratio"): (fmean(ratios), None)} if None not in ratios and len(ratios) > 1 else {}
    return mean | {
        (result["extractor"], result["resize"], metric): (value, result["metrics"].get(f"{metric}_std"))
        for result in report["results"]
        for metric, value in result["metrics"].items()
        if not metric.endswith("_std")
    }
