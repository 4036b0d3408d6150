# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The record of a run: generated images and seconds by purpose, and evaluations. `trl-distreward report` reads it."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .. import __version__
from ..files import State, write_json
from ..policies import source_of
from ..saving import without_machine
from .watch import heldout_metrics

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

RUN_RECORD = "run.json"
# What to change if a phase runs out of memory; other phases generate sets of images
REMEDIES = {
    "rollout": "lower rollout_batch_size or decode_batch_size, or set offload_trajectories=True",
    "reward": "lower num_subsets, or set offload_trajectories=True",
    "preparation": "lower decode_batch_size or per_device_train_batch_size",
    "training": "lower per_device_train_batch_size, set activation_checkpointing=True, or train an adapter",
}


@dataclass
class RunRecord:
    """Seconds and images by purpose, and evaluations: `step`, `num_images` until then, and `values`."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    images: dict[str, int] = field(default_factory=Counter)
    evaluations: list[State] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            remedy = REMEDIES.get(phase, "lower per_device_eval_batch_size or decode_batch_size")
            raise torch.OutOfMemoryError(f"{phase} runs out of memory: {remedy}.\n{error}") from error
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started

    def state_dict(self) -> State:
        return {"seconds": dict(self.seconds), "images": dict(self.images), "evaluations": list(self.evaluations)}

    def load_state_dict(self, state: State) -> None:
        self.seconds, self.images = defaultdict(float, state["seconds"]), Counter(state["images"])
        self.evaluations = list(state["evaluations"])


def sample_grids(folder: Path, most: int = 2) -> list[Path]:
    """At most so many grids of samples of a run, evenly from the first to the last."""
    found = [path for path in folder.glob("samples/step-*.png") if path.stem[5:].isdecimal() and path.is_file()]
    found.sort(key=lambda path: int(path.stem[5:]))
    return [found[i] for i in sorted({round(k * (len(found) - 1) / (most - 1)) for k in range(most)})] if found else []


def is_evaluation(logs: Mapping[str, object]) -> bool:
    """Whether a log entry comes from an evaluation."""
    return any(key.endswith("_runtime") and not key.startswith("train_") for key in logs)


def describe_run(trainer: "DiffusionTrainer") -> State:
    """Describes what is trained, the device, and the sums of the run."""
    pipeline = getattr(trainer.policy, "pipeline", None)
    parameters, device = list(trainer.skeleton.parameters()), trainer.accelerator.device
    return {
        "trainer": type(trainer).__name__,
        "version": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "processes": trainer.accelerator.num_processes,
        "model": {
            "source": source_of(trainer.policy),
            "pipeline": type(pipeline if pipeline is not None else trainer.policy).__name__,
            "network": type(trainer.policy.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "rewards": {reward.name: reward.weight for reward in trainer.rewards.all},
        "heldout": heldout_metrics(trainer),
        **trainer.run_record.state_dict(),
    }


def save_state(state: TrainerState, folder: Path) -> None:
    """Writes `trainer_state.json` without the folder of the best checkpoint, which resuming finds by its step."""
    replace(state, best_model_checkpoint=None).save_to_json(str(folder / TRAINER_STATE_NAME))


def write_record(trainer: "DiffusionTrainer") -> None:
    """Writes `run.json` and `trainer_state.json` into the output folder."""
    if not trainer.is_world_process_zero() or not trainer.state.global_step:
        return
    folder = Path(trainer.args.output_dir)
    try:
        described = json.loads(json.dumps(trainer.describe_run(), default=str))
        write_json(folder / RUN_RECORD, without_machine(described))
        save_state(trainer.state, folder)
    except OSError as error:  # no reason to end a run
        logger.warning(f"{RUN_RECORD} could not be written to {folder}: {error}.")
