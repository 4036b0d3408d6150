# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Reports of an evaluation: tables for the terminal and for Markdown, results for a model card, and changes from one
report to another.

A report is a dictionary, as it is written to JSON: `model`, `images` (how many), `image_resize` and `skip_corrupt` as
`collect_features` was given them, `settings` of the generation, `library`, and `results`, one for each feature
extractor: `extractor`, `resize`, `real` (`path`, `count`, `mean_norm`) and `metrics`, names to values, a value's
spread beside it as `<name>_std`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from rich.markup import escape
from rich.table import Table

from ..files import written_whole

Report = Mapping[str, Any]

# what the literature calls a metric in these features
_LITERATURE = {
    ("inception", "frechet"): "FID",
    ("inception", "fid"): "FID",
    ("inception", "frechet_infinity"): "FID∞",
    ("inception", "fid_infinity"): "FID∞",
    ("inception", "kid"): "KID",
    ("inception", "inception_score"): "Inception Score",
    ("inception-spatial", "frechet"): "sFID",
    ("inception-spatial", "fid"): "sFID",
    ("dinov2", "frechet"): "FD-DINOv2",
    ("dinov2", "fid"): "FD-DINOv2",
    ("clip", "cmmd"): "CMMD",
}
_CARD_SETTINGS = ("sampler", "num_steps", "guidance_scale", "guidance_channels", "labels", "seed", "weights")
_START, _END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


@dataclass(frozen=True)
class Value:
    """One number of a report."""

    extractor: str
    resize: str
    metric: str
    value: float
    std: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.extractor, self.resize, self.metric

    @property
    def name(self) -> str:
        return _LITERATURE.get((self.extractor, self.metric), self.metric.replace("_", " "))

    @property
    def features(self) -> str:
        return self.extractor if self.resize == self.extractor else f"{self.extractor}, {self.resize}"

    @property
    def shown(self) -> str:
        """To five digits, or to those that a spread leaves."""
        if not self.std:
            return f"{self.value:.5g}"
        decimals = max(0, 1 - math.floor(math.log10(self.std)))
        return f"{self.value:.{decimals}f} ± {self.std:.{decimals}f}"


def values(report: Report) -> Iterator[tuple[Value, Mapping[str, Any]]]:
    """Every number, and the real data that it is against."""
    for result in report["results"]:
        metrics = result["metrics"]
        for metric, value in metrics.items():
            if not metric.endswith("_std"):
                std = metrics.get(f"{metric}_std")
                yield Value(result["extractor"], result["resize"], metric, value, std), result["real"]


def read_report(path: str | os.PathLike) -> Report:
    """Raises `FileNotFoundError` where there is no such file, and `ValueError` where it is no report."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no report at {path}.")
    try:
        report = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a report in JSON: {error}.") from error
    if not isinstance(report, dict) or not {"model", "images", "results"} <= set(report):
        raise ValueError(f"{path} is not a report of trl-distreward evaluate: it has no model, images or results.")
    return report


_HEAD = ("metric", "features", "value")


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [(v.name, v.features, v.shown) for v, _ in values(report)]


def _against(report: Report) -> str:
    """What each extractor's values are against."""
    named = {v.features: real_name(real) for v, real in values(report)}
    return "Real data: " + "; ".join(f"{real} ({features})" for features, real in named.items()) + "."


def real_name(real: Mapping[str, Any]) -> str:
    count = f", {real['count']:,} images" if real.get("count") else ""
    return f"{Path(real['path']).name}{count}"


def _title(report: Report) -> str:
    return f"{report['model']}: {report['images']:,} images"


def plain_settings(report: Report) -> dict[str, Any]:
    """How the images were generated, those of the sampler in use beside the others."""
    settings = dict(report.get("settings") or {})
    schedule = settings.pop("schedule", {})
    idle = ("solver",) if schedule.get("sampler") == "sde" else ("noise_schedule", "noise_level", "last_step_size")
    return settings | {name: value for name, value in schedule.items() if value is not None and name not in idle}


def report_table(report: Report) -> Table:
    return _rich_table(_title(report), _HEAD, _rows(report), _against(report))


def report_markdown(report: Report) -> str:
    lines = [f"**{_title(report)}**", "", *_markdown_table(_HEAD, _rows(report)), "", _against(report)]
    if report.get("settings"):
        lines += ["", "Settings: " + ", ".join(f"`{k}` {v}" for k, v in plain_settings(report).items()) + "."]
    return "\n".join(lines) + "\n"


def _rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(escape(name), justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


_PREPARATION = {"image_resize": "--resize", "skip_corrupt": "--skip-corrupt"}  # which older reports do not tell


@dataclass(frozen=True)
class Change:
    """A metric of two reports; `percent` of the first's value, as in Table 4 of the paper."""

    before: Value
    after: Value

    @property
    def percent(self) -> float | None:
        """`None` where the first value is 0."""
        if self.before.value == 0:
            return None
        return 100 * (self.after.value - self.before.value) / abs(self.before.value)

    @property
    def entry(self) -> dict[str, Any]:
        """As it is written to JSON."""
        extractor, resize, metric = self.after.key
        values = {"before": self.before.value, "after": self.after.value, "percent": self.percent}
        return {"extractor": extractor, "resize": resize, "metric": metric, **values}


def compare_reports(before: Report, after: Report) -> list[Change]:
    """
    What changed from one report to another, in the metrics that both have.

    Raises:
        ValueError: the reports cannot be compared: other numbers of images (the Fréchet distance of fewer images is
            larger), images prepared otherwise, other real data, or no metric in common, of the same extractor with
            the same resize.
    """
    if before["images"] != after["images"]:
        raise ValueError(
            f"the reports are of {before['images']} and {after['images']} images: distances depend on their number, "
            "so it must be the same: evaluate one of them again."
        )
    for name, option in _PREPARATION.items():
        if name in before and name in after and before[name] != after[name]:
            raise ValueError(
                f"the reports were made with {option} {before[name]} and {after[name]}: evaluate both with the same."
            )
    known = {v.key: (v, real) for v, real in values(before)}
    changes = []
    for second, real in values(after):
        if second.key in known:
            first, other = known[second.key]
            _check_same_data(second.features, other, real)
            changes.append(Change(first, second))
    if not changes:
        raise ValueError(
            f"the reports have no metric in common: {_described(before)}, and {_described(after)}: evaluate both with "
            "the same --feature-extractor and --metrics."
        )
    return changes


def _described(report: Report) -> str:
    return "; ".join(f"{v.metric} of {v.features}" for v, _ in values(report))


def _check_same_data(features: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    counts = first.get("count"), second.get("count")
    if None not in counts and counts[0] != counts[1]:
        raise ValueError(
            f"the reports are against different real data, {real_name(first)} and {real_name(second)}: evaluate both "
            "against the same."
        )
    norms = first["mean_norm"], second["mean_norm"]
    if not math.isclose(*norms, rel_tol=1e-4):
        raise ValueError(
            f"the reports are against different real data, {real_name(first)} and {real_name(second)}: their mean "
            f"features of {features} have norms {norms[0]:.6g} and {norms[1]:.6g}: evaluate both against the same."
        )


def _change_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    shown = [(c, "undefined" if c.percent is None else f"{c.percent:+.1f} %") for c in changes]
    return [(c.after.name, c.after.features, c.before.shown, c.after.shown, percent) for c, percent in shown]


def _change_head(before: Report, after: Report) -> tuple[str, ...]:
    return ("metric", "features", str(before["model"]), str(after["model"]), "change")


def change_table(before: Report, after: Report, changes: Sequence[Change]) -> Table:
    title = f"{after['images']:,} images each"
    return _rich_table(title, _change_head(before, after), _change_rows(changes), _against(after))


def change_markdown(before: Report, after: Report, changes: Sequence[Change]) -> str:
    table = _markdown_table(_change_head(before, after), _change_rows(changes))
    return "\n".join([*table, "", _against(after)]) + "\n"


def eval_results(report: Report, task_type: str = "unconditional-image-generation") -> list[EvalResult]:
    """The report as [`~huggingface_hub.EvalResult`], for the metadata of a model card."""
    settings = plain_settings(report)
    chosen = {name: settings[name] for name in _CARD_SETTINGS if name in settings}
    return [
        EvalResult(
            task_type=task_type,
            dataset_type="custom",
            dataset_name=real_name(real),
            dataset_revision=real.get("revision"),
            metric_type=f"{value.metric}_{value.extractor}",
            metric_name=value.name if value.name.isupper() else f"{value.name}, {value.features}",
            metric_value=round(value.value, 6),
            metric_args={"num_images": report["images"], "resize": value.resize, **chosen},
        )
        for value, real in values(report)
    ]


def check_card_folder(folder: str | os.PathLike) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} for a model card: name one that is there.")


def update_card(folder: str | os.PathLike, report: Report) -> Path:
    """
    Writes a report into the model card of a pipeline's folder: its results among the metadata, where those of the same
    metrics give way, and a table in the text. A folder without a card gets one.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    check_card_folder(folder)
    path = Path(folder) / "README.md"
    if path.is_file():
        card = ModelCard(path.read_text(), ignore_metadata_errors=False)
    else:
        name = Path(folder).resolve().name
        data = ModelCardData(model_name=name, library_name="diffusers")
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n")
    new = eval_results(report, card.data.get("pipeline_tag") or "unconditional-image-generation")
    replaced = {(r.metric_type, r.dataset_name) for r in new}
    kept = [r for r in card.data.eval_results or [] if (r.metric_type, r.dataset_name) not in replaced]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    block = f"{_START}\n\n{report_markdown(report)}\n{_END}"
    before, mark, rest = card.text.partition(_START)
    if mark and _END in rest:
        text = before + block + rest.partition(_END)[2]
    else:
        text = f"{card.text.rstrip()}\n\n## Evaluation by trl-distreward\n\n{block}\n"
    with written_whole(path, "w") as file:
        file.write(f"---\n{card.data.to_yaml()}\n---\n{text if text[:1] == chr(10) else chr(10) + text}")
    return path
