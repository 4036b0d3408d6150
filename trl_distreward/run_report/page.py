# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The page: its head, its sections in order, and the configuration at the end."""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import written_whole
from ..hub import without_tokens
from .evaluations import coefficients_section, evaluation_section, samples_section
from .folder import Run, read_run
from .html import anchor, details, html, paragraph, section, setting, table
from .style import STYLE
from .training import cost_section, duration, logged_section, reward_section, update_section

# Nothing is fetched and nothing is run, whatever the names in a run may hold
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_report(run_dir: str | os.PathLike) -> str:
    """
    A run as one HTML page, which asks for nothing from anywhere: charts and images are inside.

    Args:
        run_dir (`str`): `output_dir` of a [`DistributionRewardTrainer`] or [`MergeCoefficientTrainer`]; the run may
            still go on or have been interrupted.

    Returns:
        `str`: HTML.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's, or its `run.json` cannot be read.
    """
    run = read_run(run_dir)
    used: set[str] = set()
    sections = [
        evaluation_section(run),
        coefficients_section(run),
        samples_section(run),
        reward_section(run, used),
        update_section(run, used),
        cost_section(run, used),
        logged_section(run, used),
        _config_section(run),
        _versions_section(run),
    ]
    body = "".join(sections)
    titles = ("Evaluation", "Coefficients", "Samples", "Reward", "Updates", "Cost", "Configuration", "Versions")
    links = "".join(
        f'<a href="#{anchor(title)}">{title}</a>' for title in titles if f'<h2 id="{anchor(title)}">' in body
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="trl-distreward {escape(__version__)}">\n'
        f"<title>{escape(run.name)}: report of a run</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f'{_header(run)}<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>\n'
        f"<footer>Written by trl-distreward {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )
    return without_tokens(page)


def write_report(run_dir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """
    Writes `render_report(run_dir)`, whole or not at all.

    Args:
        run_dir (`str`): as in `render_report`.
        output (`str`, *optional*): the file; `report.html` in the run's folder by default.

    Returns:
        `Path`: of the file.
    """
    page = render_report(run_dir)
    path = Path(run_dir, "report.html") if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"output={str(path)!r} is a folder: name a file, e.g. {path / 'report.html'}.")
    with written_whole(path) as file:
        file.write(page.encode())
    return path


def _header(run: Run) -> str:
    record = run.record
    step, most = record["step"], record.get("max_steps")
    model = record.get("model", {})
    facts: dict[str, Any] = {"updates": f"{step:,} of {most:,}" if most else f"{step:,}"}
    if record.get("num_images"):
        facts["images generated for training"] = record["num_images"]
    if record.get("images"):
        facts["images generated in total"] = sum(record["images"].values())
    if record.get("total_seconds"):
        facts["time"] = duration(record["total_seconds"])
    if model:
        source = f" of {model['source']}" if model.get("source") else ""
        facts["model"] = f"{model['network']}{source}"
        facts["parameters"] = f"{model['parameters']:,}, {model['trained']:,} trained"
    if record.get("device"):
        processes = record.get("processes", 1)
        facts["device"] = record["device"] + (f", {processes} processes" if processes > 1 else "")
    if record.get("started"):
        facts["started, last written"] = f"{_date(record['started'])}, {_date(record.get('updated', ''))}"
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{html(value)}</dd></div>" for name, value in facts.items())
    status = ""
    if most and step < most:
        status = paragraph(
            f"Not at its end: {step:,} of {most:,} updates. It goes on still, or was stopped.", "status"
        )
    if not run.recorded:
        status += paragraph(
            "There is no run.json: what is shown is what the newest checkpoint tells, without cost and versions.",
            "status",
        )
    return (
        f'<header><h1>{escape(run.name)}</h1><p class="faint">A run of the {escape(record["trainer"])} of '
        f'trl-distreward</p>{status}<dl class="facts">{listed}</dl></header>'
    )


def _date(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _config_section(run: Run) -> str:
    values = run.settings
    if not values:
        return ""
    config = run.record["config"]
    defaults: Mapping[str, Any] = config.get("defaults", {})
    groups: Mapping[str, list[str]] = config.get("groups") or {"everything": list(values)}
    changed = [
        (group, name, setting(values[name]), setting(defaults[name]))
        for group, names in groups.items()
        for name in names
        if name in defaults
    ]
    rows = [(setting(name), value, default, group) for group, name, value, default in changed]
    top = table(("setting", "value", "default", "controls"), rows, "What differs from the defaults.", numbers=())
    if not run.recorded:
        top = ""
    elif not rows:
        top = paragraph("Everything is at its default.")
    folded = "".join(
        details(
            f"All settings that control {group} ({len(names)})",
            table(("setting", "value"), [(setting(name), setting(values[name])) for name in names], numbers=()),
        )
        for group, names in groups.items()
    )
    return section("Configuration", top, folded)


def _versions_section(run: Run) -> str:
    versions = run.record.get("versions") or {}
    return section("Versions", table(("package", "version"), [(setting(k), setting(v)) for k, v in versions.items()]))
