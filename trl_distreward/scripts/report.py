# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Write an HTML page of a run: curves, samples before and after, cost, and settings that differ from the defaults.

    trl-distreward report sit-distreward
    trl-distreward report merged --output merged.html

RUN_DIR is the output_dir of a training or a merge, which may still be running. The page is one file and loads nothing.
"""

import argparse
import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from .. import __version__
from ..files import State, written_whole
from ..trainer.diffusion_distribution_config import DiffusionDistributionConfig
from ..trainer.merge_coefficient_config import MergeCoefficientConfig
from ..trainer.run_record import RUN_RECORD, sample_grids
from ..trainer.watch import PARTED, parted
from . import cli

Lines = dict[str, dict[int, float]]  # values by update, for each line of a chart
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # head and rows

INK = "#010203"  # stands for the colour of the page's text, which follows the reader's dark mode
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-distreward",
    "axes.grid": True,
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
HELD_OUT = "held out"
GRIDS = 6  # of samples, at most
LARGEST_SIDE = 1280  # of an embedded image, in pixels
CHART_OF = {"reward": "reward/mean", "reward_std": "reward/std", "reward_best": "reward/best"}
SHOWN = ("reward", "reference", "seconds", "coefficients")  # charts that are not folded
NOT_SHOWN = ("eval_", "train_", "total_flos", "step", "epoch", "num_images")
NOT_SETTINGS = ("output_dir", "run_name", "logging_dir", "use_cpu", "disable_tqdm")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("report", __doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run")
    parser.add_argument("--output", metavar="FILE", help="page to write (default: RUN_DIR/report.html)")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    path = Path(arguments.output or Path(arguments.run_dir) / "report.html")
    page = render_report(arguments.run_dir)
    with written_whole(path, "w") as file:
        file.write(page)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def render_report(run_dir: str | Path) -> str:
    """Renders the page of a run from its `output_dir`, as HTML that loads nothing."""
    folder = Path(run_dir)
    state, settings = _read_newest(folder, "trainer_state.json"), _read_newest(folder, "training_args.json")
    if state is None:
        raise FileNotFoundError(f"{folder} has no trainer_state.json and no checkpoint: name the output_dir of a run.")
    record = json.loads((folder / RUN_RECORD).read_text()) if (folder / RUN_RECORD).is_file() else {}
    lines = chart_lines(state["log_history"], record.get("evaluations", []))
    charts = {name: _draw(name, each) for name, each in sorted(lines.items())}
    warnings, distances = compared(record.get("evaluations", []), record.get("heldout", []))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text())
    return template.render(
        name=folder.resolve().name,
        version=__version__,
        state=state,
        record=record,
        summary=summary_rows(lines),
        distances={**distances, **{name: chart for name, chart in charts.items() if name.startswith("eval_")}},
        curves={name: chart for part in SHOWN for name, chart in charts.items() if name.startswith(part)},
        others={name: chart for name, chart in charts.items() if not name.startswith(("eval_", *SHOWN))},
        samples={path.stem.removeprefix("step-"): _embed(path) for path in sample_grids(folder, GRIDS)},
        warnings=warnings,
        best=(settings or {}).get("metric_for_best_model"),
        tables={**record_tables(record), "Settings that differ from the defaults": settings_table(settings or {})},
    )


def _read_newest(folder: Path, name: str) -> Any:
    """Content of the JSON file of the run or of one of its checkpoints that was written last."""
    found = [*folder.glob(name), *folder.glob(f"checkpoint-*/{name}")]
    return json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text()) if found else None


def chart_lines(logs: list[State], evaluations: list[State]) -> dict[str, Lines]:
    """Returns the lines of every chart: `ratio/max` is `max` of `ratio`, `eval_ode_kid` is `ODE` of `eval_kid`."""
    charts: defaultdict[str, Lines] = defaultdict(dict)
    entries = [(log["step"], key, value) for log in logs for key, value in log.items()]
    entries += [(each["step"], f"eval_{key}", value) for each in evaluations for key, value in each["values"].items()]
    for step, key, value in sorted(entries, key=lambda entry: entry[0]):
        sampled = re.fullmatch(r"eval_((?:sde|ode)(?:_\d+)?)_(.+)", key)
        if sampled is not None:
            charts[f"eval_{sampled[2]}"].setdefault(sampled[1].upper(), {})[step] = value
        elif not key.startswith(NOT_SHOWN):
            chart, _, line = CHART_OF.get(key, key).rpartition("/")
            charts[chart or line].setdefault(line, {})[step] = value
    return {name if len(lines) > 1 else "/".join({name: 0, **lines}): lines for name, lines in charts.items()}


def compared(evaluations: list[State], heldout: list[str]) -> tuple[dict[int, str], dict[str, Markup]]:
    """Returns warnings by update, and a chart of distances relative to the first, with marks where they part."""
    lines: Lines = defaultdict(dict)
    for each in evaluations if heldout else ():
        for key, value in each["values"].items():
            own, first = "_distance_" in key, evaluations[0]["values"].get(key)
            if first and (own or key.endswith(tuple(f"_{name}" for name in heldout))):
                lines[key if own else f"{key}, {HELD_OUT}"][each["step"]] = value / first
    ends = range(1, len(evaluations) + 1)
    found = {evaluations[end - 1]["step"]: parted(evaluations[:end], heldout) for end in ends}
    warnings = {step: f"{', '.join(names)} {PARTED}." for step, names in found.items() if names}
    title = "distances, relative to the first"
    return warnings, {title: _draw(title, lines, warnings)} if lines else {}


def _draw(title: str, lines: Lines, marks: Iterable[int] | None = None) -> Markup:
    """An SVG of lines by update; a line `std` becomes a band around `mean`. With `marks`, the reward's are dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            x, y = list(points), list(points.values())
            if name == "std" and "mean" in lines:
                means = lines["mean"].values()
                low, high = ([mean + sign * std for mean, std in zip(means, y, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, alpha=0.2, linewidth=0)
            else:
                style = "-" if marks is None or HELD_OUT in name else "--"
                axes.plot(x, y, style, label=name, marker="." if len(x) < 60 else None)
        for step in marks or ():
            axes.axvline(step, color="tab:red", linewidth=1)
        axes.set_xlabel("update")
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize="small")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)} by update"', 1))


def _embed(path: Path) -> str:
    """A data URL of an image, made smaller if it is large."""
    buffer = io.BytesIO()
    with Image.open(path, formats=["PNG"]) as image:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image.save(buffer, "WEBP", quality=90, lossless=max(image.size) < LARGEST_SIDE // 2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def summary_rows(charts: Mapping[str, Lines]) -> list[tuple[str, str, float, float, str]]:
    """Returns metric, sampler, first and last value of each evaluation, and the change in percent."""
    rows = []
    for name, lines in charts.items():
        for sampler, points in lines.items() if name.startswith("eval_") else ():
            first, last = points[min(points)], points[max(points)]
            change = f"{100 * (last - first) / abs(first):+.1f} %" if first else ""
            rows.append((name.split("/")[0].removeprefix("eval_"), sampler, first, last, change))
    return rows


def record_tables(record: State) -> dict[str, Table]:
    """Returns the tables of what a run records: costs, and coefficients and comparison of a merge."""
    tables: dict[str, Table] = {}
    if "coefficients" in record:
        columns = record["coefficients"]
        tables["Coefficients"] = (["checkpoint", *columns], list(zip(record["pool"], *columns.values(), strict=True)))
    if "comparison" in record:
        merges = record["comparison"]
        rows = [(name, *values.values()) for name, values in merges.items()]
        tables["Comparison"] = (["merge", *next(iter(merges.values()))], rows)
    seconds, images = record.get("seconds", {}), record.get("images", {})
    total = sum(seconds.values())
    costs = [(name, value, f"{value / total:.1%}", images.get(name, "")) for name, value in seconds.items()]
    costs += [("together", total, "100.0%", sum(images.values()))] if costs else []
    return {**tables, "Cost": (["phase", "seconds", "share", "images"], costs)}


def settings_table(settings: Mapping[str, object]) -> Table:
    """Returns the table of the settings that differ from the defaults."""
    config = MergeCoefficientConfig if "coefficient_map" in settings else DiffusionDistributionConfig
    defaults = json.loads(config(output_dir="run", use_cpu=True).to_json_string())
    names = [name for name in settings if name in defaults and name not in NOT_SETTINGS]
    rows = [(name, str(settings[name]), str(defaults[name])) for name in names if settings[name] != defaults[name]]
    return ["setting", "value", "default"], rows
