# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a run left in its output folder."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ..trainer.run_record import RUN_RECORD, is_evaluation

STATE = "trainer_state.json"
_ESSENTIAL = ("trainer", "step", "evaluations", "log_history")


@dataclass(frozen=True)
class Grid:
    """A picture of images from the same noise as those of the other grids."""

    step: int
    path: Path


@dataclass(frozen=True)
class Run:
    """
    Args:
        folder (`Path`): the run's `output_dir`.
        record (`dict`): the content of its `run.json`, or what a checkpoint tells of it.
        recorded (`bool`): whether there was a `run.json`.
        grids (`list[Grid]`): sample grids, by step.
    """

    folder: Path
    record: Mapping[str, Any]
    recorded: bool
    grids: list[Grid]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.record.get("config", {}).get("values", {})

    @property
    def seed(self) -> int:
        """Of the noise of evaluations during training."""
        return self.settings.get("eval_seed", 0)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Of the model as it was, from the noise that all share; the last one of each step."""
        by_step = {e["step"]: e for e in self.record["evaluations"] if self._is_own(e)}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def other_evaluations(self) -> list[dict[str, Any]]:
        return [e for e in self.record["evaluations"] if not self._is_own(e)]

    def _is_own(self, evaluation: Mapping[str, Any]) -> bool:
        return "of" not in evaluation and evaluation.get("seed", self.seed) == self.seed

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """Of updates; those since the last log are in transformers' summary of the training."""
        summary = ("train_", "total_flos")
        return [
            {name: value for name, value in entry.items() if not name.startswith(summary)}
            for entry in self.record["log_history"]
            if "step" in entry
        ]

    def series(self, key: str) -> list[tuple[float, float]]:
        """What was logged under a name, by step."""
        return list({e["step"]: e[key] for e in self.logs if isinstance(e.get(key), int | float)}.items())

    @cached_property
    def logged(self) -> list[str]:
        """Every name that was logged, in the order of appearance."""
        return list(dict.fromkeys(key for entry in self.logs for key in entry))

    @cached_property
    def images_by_step(self) -> list[tuple[float, float]]:
        """Images generated for training by some steps, ascending."""
        evaluated = {e["step"]: e["num_images"] for e in self.record["evaluations"] if "num_images" in e}
        known = dict(self.series("num_images")) | evaluated
        return sorted(({0: 0} | known).items()) if known else []

    def split_metric(self, name: str) -> tuple[str, str]:
        """`ode_distance_features` as its schedule and its metric."""
        schedules = sorted(self.record.get("eval_schedules", ()), key=len, reverse=True)
        for schedule in schedules:
            if name.startswith(f"{schedule}_"):
                return schedule, name.removeprefix(f"{schedule}_")
        found = re.fullmatch(r"((?:sde|ode)(?:_\d+)?)_(.+)", name)
        return (found[1], found[2]) if found else ("", name)


def read_run(folder: str | os.PathLike) -> Run:
    """
    Reads a run's output folder; an interrupted run's as well, and one without `run.json` by its newest checkpoint.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a run's, or its `run.json` is no record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name the output_dir of a run.")
    path = folder / RUN_RECORD
    if path.is_file():
        record = _read_json(path)
        lacking = [name for name in _ESSENTIAL if name not in record]
        if lacking:
            raise ValueError(f"{path} is not the record of a run: it has no {', '.join(lacking)}.")
        return Run(folder, record, True, [grid for grid in _grids(folder) if not _is_of_earlier_run(grid, record)])
    states = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_step_of)
    if not states:
        raise ValueError(
            f"{folder} is not the output_dir of a run, which has a {RUN_RECORD} or checkpoints{_hint(folder)}."
        )
    return Run(folder, _record_of_checkpoint(states[-1]), False, _grids(folder))


def _hint(folder: Path) -> str:
    if (folder / STATE).is_file():
        return f": it is a checkpoint; name {folder.parent}"
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RUN_RECORD}"))
    if runs:
        return f": it holds runs, name one of {', '.join(str(folder / run) for run in runs)}"
    return ", written from the first update on"


def _step_of(path: Path) -> int:
    found = re.search(r"(\d+)$", path.parent.name if path.name == STATE else path.stem)
    return int(found[1]) if found else -1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return content


def _record_of_checkpoint(path: Path) -> dict[str, Any]:
    """What the state of transformers' trainer tells."""
    state, arguments = _read_json(path), path.parent / "training_args.json"
    values = _read_json(arguments) if arguments.is_file() else {}
    evaluations = []
    for entry in state["log_history"]:
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
        }
        if metrics:
            evaluations.append({"step": entry["step"], "values": metrics})
    record = {
        "trainer": "MergeCoefficientTrainer" if "coefficient_map" in values else "DistributionRewardTrainer",
        "step": state["global_step"],
        "max_steps": state.get("max_steps"),
        "evaluations": evaluations,
        "log_history": [entry for entry in state["log_history"] if not is_evaluation(entry)],
        "config": {"values": values},
    }
    learnt = path.parent / "coefficients.json"
    if learnt.is_file():
        record["coefficients"] = _read_json(learnt).get("coefficients", {})
    return record


def _grids(folder: Path) -> list[Grid]:
    paths = [path for path in (folder / "samples").glob("step-*.png") if _step_of(path) >= 0]
    return [Grid(_step_of(path), path) for path in sorted(paths, key=_step_of)]


def _is_of_earlier_run(grid: Grid, record: Mapping[str, Any]) -> bool:
    """Whether a run that went further left it in this folder before this one started."""
    if grid.step <= record["step"] or "started" not in record:
        return False
    return grid.path.stat().st_mtime < datetime.fromisoformat(record["started"]).timestamp()
