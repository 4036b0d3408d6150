# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves in its output folder for `trl-distreward report`: one JSON file, kept up to date."""

import dataclasses
import platform
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import TrainerCallback

from .. import __version__
from .recipes import RECIPES

RUN_RECORD = "run.json"
# Share of a run's time that writing its record may take
_WRITING_SHARE = 0.02
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "diffusers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "numpy",
    "scipy",
)
# Set by TrainingArguments to follow others, the machine or the folder; or masked
_DERIVED = ("output_dir", "do_eval", "disable_tqdm", "dataloader_pin_memory", "accelerator_config", "hub_token")
_REST = "the optimizer and the run"  # of transformers' own arguments


class RunRecord:
    """
    What accumulates over a run, besides the logs.

    Attributes:
        started (`str`): when, in UTC.
        evaluations (`list[dict]`): `step`, `num_images` generated for training by then, `seed`, `values`, and what
            was evaluated if it was not the model as it is.
        skipped (`list[dict]`): `step` and `reason` of updates that were not made.
        seconds (`dict`): by phase.
        images (`Counter`): generated, by purpose.
    """

    def __init__(self) -> None:
        self.live = False  # there is something that an earlier run's record may give way to
        self._since: float | None = None
        self._written = self._cost = 0.0
        self.clear()

    def clear(self) -> None:
        self.started = now()
        self.evaluations: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.images: Counter[str] = Counter()
        self._total = 0.0

    def begin(self) -> None:
        """Forgets earlier training; what was evaluated before any is of the model that this one starts from."""
        if self.live:
            self.clear()
        self.live = False

    @property
    def total_seconds(self) -> float:
        """Of training, and of evaluations before and after it."""
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts towards the total; inside another, nothing."""
        if self._since is not None:
            yield
            return
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._total, self._since = self.total_seconds, None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "evaluations": list(self.evaluations),
            "skipped": list(self.skipped),
            "seconds": dict(self.seconds),
            "images": dict(self.images),
            "total_seconds": self.total_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what a checkpoint knew; evaluations that this process made before it resumed stay."""
        again = [found for found in self.evaluations if found["step"] == 0 and found not in state["evaluations"]]
        self.started, self._total = state["started"], state["total_seconds"]
        self._since = None if self._since is None else time.perf_counter()
        self.evaluations, self.skipped = [*again, *state["evaluations"]], list(state["skipped"])
        self.seconds, self.images = defaultdict(float, state["seconds"]), Counter(state["images"])

    def is_due(self) -> bool:
        """Whether writing again now keeps to its share of the time."""
        return time.perf_counter() - self._written >= self._cost / _WRITING_SHARE

    @contextmanager
    def writing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._written = time.perf_counter()
        self._cost = self._written - started


class KeepRecord(TrainerCallback):
    """Writes the record as training goes on."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.run_record.live = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.run_record.is_due():
            self.trainer.write_record()


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Whether a log entry belongs to an evaluation: transformers logs how long each one took."""
    return any(name.endswith("_runtime") and name != "train_runtime" for name in entry)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of this library, Python, and the packages that results depend on."""
    found = {"trl-distreward": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} {platform.machine()}, torch's threads: {torch.get_num_threads()}"


def describe_config(args: Any) -> dict[str, Any]:
    """
    The configuration without secrets, what of it is not as it would be by default or by its recipe, and in which
    groups the docstrings of its class and that one's bases explain it.

    Returns:
        `dict`: `values`, `defaults` of those that differ, and `groups` of names.
    """
    values = args.to_dict()  # which masks tokens
    recipe = RECIPES.get(getattr(args, "recipe", ""), {})
    defaults = {}
    for field in dataclasses.fields(args):
        if field.init and field.name in values and field.name not in _DERIVED:
            default = recipe.get(field.name, field.default)
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is not dataclasses.MISSING and not _alike(values[field.name], default):
                defaults[field.name] = getattr(default, "value", default)
    groups: dict[str, list[str]] = {}
    for kind in type(args).__mro__:
        parts = re.split(r"> Parameters that control ([^\n]+)", vars(kind).get("__doc__") or "")[1:]
        for title, text in zip(parts[::2], parts[1::2], strict=True):
            own = text.split("\n    >")[0]
            named = [name for name in re.findall(r"^ +(\w+) \(`", own, flags=re.MULTILINE) if name in values]
            groups[title] = [*groups.get(title, []), *named]
    known = {name for names in groups.values() for name in names}
    groups[_REST] = [name for name in values if name not in known]
    return {"values": values, "defaults": defaults, "groups": groups}


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is a default, or what `TrainingArguments` makes of it."""
    default = getattr(default, "value", default)
    if default is None:
        return value in (None, False, [])
    if isinstance(value, list) and not isinstance(default, list):
        return value == [default] or (default in ("", "none") and not value)
    return value == default or str(value) == str(default)
