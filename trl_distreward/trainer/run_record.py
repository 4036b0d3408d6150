# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The record of a run: generated images and seconds by purpose, and evaluations. `trl-distreward report` reads it."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__

if TYPE_CHECKING:
    from .base import DiffusionTrainer

RUN_RECORD = "run.json"


def is_evaluation(logs: Mapping[str, Any]) -> bool:
    """Whether a log entry comes from an evaluation."""
    return any(key.endswith("_runtime") and not key.startswith("train_") for key in logs)


class RunRecord:
    """
    Sums over a run.

    Attributes:
        seconds (`dict[str, float]`): by phase.
        images (`collections.Counter`): generated images, by purpose.
        evaluations (`list[dict]`): `step`, `num_images` generated for training until then, and `values`.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.images: Counter[str] = Counter()
        self.evaluations: list[dict[str, Any]] = []

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.seconds),
            "images": dict(self.images),
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds, self.images = defaultdict(float, state["seconds"]), Counter(state["images"])
        self.evaluations = list(state["evaluations"])


def describe_run(trainer: "DiffusionTrainer") -> dict[str, Any]:
    """What is trained, on what, and the sums of the run, for `run.json`."""
    pipeline = getattr(trainer.policy, "pipeline", None)
    parameters, device = list(trainer.skeleton.parameters()), trainer.accelerator.device
    return {
        "trainer": type(trainer).__name__,
        "version": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "processes": trainer.accelerator.num_processes,
        "model": {
            "source": getattr(pipeline, "config", {}).get("_name_or_path"),
            "pipeline": type(pipeline if pipeline is not None else trainer.policy).__name__,
            "network": type(trainer.policy.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        **trainer.run_record.state_dict(),
    }
