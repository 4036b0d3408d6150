# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What became of the model: evaluations over the run, the merges it was compared with, and images."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from PIL import Image

from .charts import NUM_STYLES, Series, bar_chart, line_chart, number
from .folder import Run
from .html import Markup, details, paragraph, picture, section, setting, table

_MOST_BETWEEN = 8  # grids shown besides the first and the last


def is_better_higher(run: Run, metric: str) -> bool | None:
    """`None` where it is not known."""
    told = run.record.get("higher_is_better", {}).get(metric)
    return False if told is None and metric.startswith("distance") else told


def change(before: float, after: float, higher: bool | None) -> Markup:
    """Relative, and whether it is for the better, in a word as well as a colour."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return Markup("undefined")
    percent = 100 * (after - before) / abs(before)
    shown = (f"{percent:+.1f} %" if abs(percent) >= 0.05 else f"{percent:+.1g} %").replace("-", "\N{MINUS SIGN}")
    if higher is None or before == after:
        return Markup(shown)
    word = "better" if (after > before) == higher else "worse"
    return Markup(f'<span class="{word}">{shown}, {word}</span>')


def evaluation_section(run: Run) -> str:
    others = details("Evaluations of something else, or from other noise", _other_evaluations(run))
    if not run.evaluations:
        alone = f"No model was evaluated as it was from the noise of seed {run.seed}." if others else ""
        nothing = "Nothing was evaluated: set eval_strategy and eval_steps, or call trainer.evaluate()."
        return section("Evaluation", paragraph(alone or nothing), others)
    number_of = run.record.get("num_eval_images")
    images = f"{number_of:,} images each, " if number_of else ""
    return section(
        "Evaluation",
        _summary_table(run, f"Evaluations of {images}all from the noise of seed {run.seed}."),
        details("Over several seeds of the noise", _seeds_table(run)),
        f'<div class="charts">{"".join(_metric_charts(run))}</div>',
        details("All evaluations", _all_evaluations(run)),
        others,
    )


def _names(run: Run) -> list[str]:
    return list(dict.fromkeys(name for evaluation in run.evaluations for name in evaluation["values"]))


def _values(run: Run, name: str) -> list[tuple[float, float]]:
    return [(e["step"], e["values"][name]) for e in run.evaluations if name in e["values"]]


def _ordered(run: Run) -> list[tuple[str, str, str]]:
    """`(metric, schedule, name)`, a metric's schedules together."""
    split = [(metric, schedule, name) for name in _names(run) for schedule, metric in [run.split_metric(name)]]
    order = list(dict.fromkeys(metric for metric, *_ in split))
    return sorted(split, key=lambda item: order.index(item[0]))


def _summary_table(run: Run, caption: str) -> str:
    rows = []
    for metric, schedule, name in _ordered(run):
        points = _values(run, name)
        higher = is_better_higher(run, metric)
        (first_step, first), (last_step, last) = points[0], points[-1]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        best = "direction not known" if higher is None else "\N{EN DASH}"
        if higher is not None and finite:
            step, value = (max if higher else min)(finite, key=lambda point: point[1])
            best = f"{number(value)} (update {step:,})"
        changed = change(first, last, higher) if len(points) > 1 else "\N{EN DASH}"
        shown = [f"{number(value)} (update {step:,})" for step, value in ((first_step, first), (last_step, last))]
        rows.append((metric, schedule.upper().replace("_", " "), shown[0], best, shown[1], changed))
    return table(("metric", "sampler", "first", "best", "last", "change"), rows, caption, numbers=(2, 3, 4, 5))


def _seeds_table(run: Run) -> str:
    """Where the first and the last model were evaluated from several seeds: their spread."""
    by_step: dict[int, dict[int, Mapping[str, float]]] = {}
    for evaluation in run.record["evaluations"]:
        if "of" not in evaluation and "seed" in evaluation:
            by_step.setdefault(evaluation["step"], {})[evaluation["seed"]] = evaluation["values"]
    if len(by_step) < 2:
        return ""
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    seeds = sorted(set(first) & set(last))
    if len(seeds) < 2:
        return ""
    rows = []
    for metric, schedule, name in _ordered(run):
        ends = [[values[seed][name] for seed in seeds if name in values[seed]] for values in (first, last)]
        if all(len(values) == len(seeds) for values in ends):
            shown = [_mean_and_deviation(values) for values in ends]
            before, after = (statistics.fmean(values) for values in ends)
            rows.append((metric, schedule.upper(), *shown, change(before, after, is_better_higher(run, metric))))
    caption = f"Mean and standard deviation over noise of seeds {', '.join(map(str, seeds))}."
    head = ("metric", "sampler", f"update {min(by_step):,}", f"update {max(by_step):,}", "change")
    return table(head, rows, caption, numbers=(2, 3, 4))


def _mean_and_deviation(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "not finite"
    return f"{number(statistics.fmean(values))} ± {number(statistics.stdev(values), 2)}"


def _metric_charts(run: Run) -> list[str]:
    by_metric: dict[str, list[Series]] = {}
    for metric, schedule, name in _ordered(run):
        by_metric.setdefault(metric, []).append(Series(schedule.upper().replace("_", " "), _values(run, name)))
    charts = []
    for metric, series in by_metric.items():
        higher = is_better_higher(run, metric)
        note = "" if higher is None else f"{'Higher' if higher else 'Lower'} is better."
        charts.append(line_chart(metric, series, run.images_by_step, note))
    return charts


def _all_evaluations(run: Run) -> str:
    names = _names(run)
    rows = [
        (e["step"], e.get("num_images", "\N{EN DASH}"), *(e["values"].get(name, "\N{EN DASH}") for name in names))
        for e in run.evaluations
    ]
    return table(("update", "images", *names), rows)


def _other_evaluations(run: Run) -> str:
    rows = [
        (
            e.get("of", "the model"),
            e["step"],
            e.get("seed", "\N{EN DASH}"),
            ", ".join(f"{k} {number(v)}" for k, v in e["values"].items()),
        )
        for e in run.other_evaluations
    ]
    return table(("what", "update", "seed", "values"), rows, numbers=(1, 2))


def samples_section(run: Run) -> str:
    if not run.grids:
        return section(
            "Samples",
            paragraph("There are no grids of samples: add LogSamplesCallback(trainer) to the trainer's callbacks."),
        )
    first, last, between = run.grids[0], run.grids[-1], run.grids[1:-1]
    pair = [_grid(first.path, f"update {first.step:,}")]
    if last is not first:
        pair.append(_grid(last.path, f"update {last.step:,}"))
    shown = between
    if len(between) > _MOST_BETWEEN:
        shown = [between[round(i * (len(between) - 1) / (_MOST_BETWEEN - 1))] for i in range(_MOST_BETWEEN)]
    grids = "".join(_grid(grid.path, f"update {grid.step:,}") for grid in shown)
    counted = f"{len(shown)} of {len(between)}" if len(shown) < len(between) else f"{len(between)}"
    return section(
        "Samples",
        paragraph("The same noise and conditions each time: what differs is the model."),
        f'<div class="pair">{"".join(pair)}</div>',
        details(f"Grids in between ({counted})", f'<div class="pair">{grids}</div>' if grids else ""),
    )


def _grid(path: Any, caption: str) -> str:
    try:
        return picture(path, caption)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        return paragraph(f"{path.name} cannot be shown: {type(error).__name__}.", "status")


def coefficients_section(run: Run) -> str:
    """Of a merge: a bar for each checkpoint, or for its mean over groups where each has coefficients of its own."""
    learnt: Mapping[str, list[float]] = run.record.get("coefficients") or {}
    if not learnt:
        return ""
    count = len(next(iter(learnt.values())))
    places = run.record.get("pool") or [f"checkpoint {i}" for i in range(1, count + 1)]
    numbered = list(enumerate(places, start=1))
    means = [statistics.fmean(column) for column in zip(*learnt.values(), strict=True)]
    if len(learnt) == 1:
        title, over_updates = "Learnt coefficients by number of checkpoint", _coefficients_over_updates(run, count)
        start = (run.record.get("initial_coefficients") or {}).values()
        columns = list(zip(*start, *learnt.values(), strict=True))
        head = ("number", "checkpoint", *(["start"] if start else []), "learnt")
        rows = [(i, setting(place), *column) for (i, place), column in zip(numbered, columns, strict=True)]
        shown = table(head, rows, numbers=range(2, len(head)))
    else:
        title, over_updates = f"Learnt coefficients, mean over {len(learnt)} groups", ""
        caption = "; ".join(f"{i}: {place}" for i, place in numbered)
        groups = [(setting(group), *values) for group, values in learnt.items()]
        shown = details("All groups", table(("group", *(str(i) for i, _ in numbered)), groups, caption))
    chart = bar_chart(title, list(zip(places, means, strict=True)))
    return section("Coefficients", f'<div class="charts">{chart}{over_updates}</div>', shown, _comparison(run))


def _coefficients_over_updates(run: Run, count: int) -> str:
    charts = []
    for first in range(0, count, NUM_STYLES):  # as many as can be told apart
        numbers = range(first, min(first + NUM_STYLES, count))
        series = [Series(f"checkpoint {i + 1}", run.series(f"coefficients/{i}")) for i in numbers]
        title = f"Coefficients of checkpoints {numbers[0] + 1} to {numbers[-1] + 1}"
        charts.append(line_chart(title, series, run.images_by_step))
    return "".join(charts)


def _comparison(run: Run) -> str:
    comparison = run.record.get("comparison")
    if not comparison:
        return ""
    names = list(next(iter(comparison.values())))
    base = comparison.get("last")

    def cell(values: Mapping[str, float], name: str) -> Markup:
        if base is None or values is base:
            return Markup(number(values[name]))
        higher = is_better_higher(run, run.split_metric(name)[1])
        return Markup(f"{number(values[name])} ({change(base[name], values[name], higher).text})")

    rows = [(merge, *(cell(values, name) for name in names)) for merge, values in comparison.items()]
    caption = "Merges from the same noise, and their change from the last checkpoint."
    return "<h3>Comparison</h3>" + table(("merge", *names), rows, caption)
