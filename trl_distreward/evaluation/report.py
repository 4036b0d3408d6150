# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Tables of evaluations, and changes from one evaluation to another.

A report is a dictionary: `model`, `images` (their number), `resize`, `settings` of the generation, `library`, and
`results`, one for each feature extractor: `extractor`, `resize`, `real` (`path`, `count`, `mean_norm`) and `metrics`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]

# names of metrics in the literature, by extractor and metric
_LITERATURE = {
    ("inception", "frechet"): "FID",
    ("inception", "frechet_infinity"): "FID∞",
    ("inception-spatial", "frechet"): "sFID",
    ("dinov2", "frechet"): "FD-DINOv2",
    ("clip", "cmmd"): "CMMD",
}


def read_report(path: str | os.PathLike) -> Report:
    """Reads a report; raises `ValueError` if the file is none."""
    try:
        report = json.loads(Path(path).read_text())
        report["results"], report["images"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a report of trl-distreward evaluate ({error!r}).") from error
    return report


def check_comparable(before: Report, after: Report) -> None:
    """Raises `ValueError` if distances of the two reports cannot be compared."""
    for key, option in (("images", "--num-images"), ("resize", "--resize")):
        if before[key] != after[key]:
            raise ValueError(
                f"the reports cannot be compared: their {key} are {before[key]} and {after[key]}. Evaluate both with "
                f"the same {option}."
            )
    known = {result["extractor"]: result["real"] for result in before["results"]}
    for result in after["results"]:
        name, real = result["extractor"], result["real"]
        if name in known and not math.isclose(real["mean_norm"], known[name]["mean_norm"], rel_tol=1e-4):
            raise ValueError(
                f"the reports cannot be compared: the real images in features of {name} are {known[name]['path']} and "
                f"{real['path']}, which differ. Evaluate both against the same."
            )


def markdown_table(*reports: Report) -> str:
    """Returns a table of the metrics that one or two reports share; of two, with the change in percent."""
    values = [_values(report) for report in reports]
    head = ["metric", "features", *(str(report["model"]) for report in reports), *["change"][: len(reports) - 1]]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for key, (first, _) in values[0].items():
        if all(key in each for each in values):
            extractor, resize, metric = key
            row = [_LITERATURE.get((extractor, metric), metric), ", ".join(dict.fromkeys((extractor, resize)))]
            row += [_shown(*each[key]) for each in values]
            if len(reports) > 1:
                row.append(f"{100 * (values[1][key][0] - first) / abs(first):+.1f} %" if first else "undefined")
            rows.append(row)
    reals = {f"{Path(r['real']['path']).name} ({r['real']['count'] or '?'} images)": 0 for r in reports[0]["results"]}
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{reports[0]['images']:,} images. Real data: {', '.join(reals)}."])


def _values(report: Report) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """Values and standard deviations by extractor, resize and metric."""
    return {
        (result["extractor"], result["resize"], metric): (value, result["metrics"].get(f"{metric}_std"))
        for result in report["results"]
        for metric, value in result["metrics"].items()
        if not metric.endswith("_std")
    }


def _shown(value: float, std: float | None) -> str:
    """Five digits, or those that the standard deviation leaves."""
    if not std:
        return f"{value:.5g}"
    digits = max(0, 1 - math.floor(math.log10(std)))
    return f"{value:.{digits}f} ± {std:.{digits}f}"
