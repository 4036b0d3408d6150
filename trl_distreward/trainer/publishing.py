# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pushes to the Hub, without anything that belongs to this machine."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub import push_folder
from .checkpointing import RAW_WEIGHTS, TRAINING_STATE
from .resuming import IDENTITY, MANIFEST
from .run_record import RUN_RECORD

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

# Files of a checkpoint that only resuming needs; some are DeepSpeed's
_RESUME_ONLY = ["optimizer*", "global_step*", "latest", "zero_to_fp32.py", "scheduler.pt", "scaler.pt", "rng_state*"]
_RESUME_ONLY += ["trainer_state.json", "process_state*", RAW_WEIGHTS, TRAINING_STATE, IDENTITY, MANIFEST]
# Files of the output folder that name folders of this machine, or that are results of other runs
_NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", "trainer_state.json", RUN_RECORD, "*.html"]
_NOT_PUSHED += ["real_statistics.*", "*.work/*", "*.tfevents.*"]  # whose names hold the host's


class Publisher:
    """Pushes a trainer's output, and keeps the pushes that run in the background."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer
        self.uploads: list[Future] = []

    def push_checkpoint(self, folder: Path) -> None:
        """Pushes a checkpoint's pipeline in the background; transformers would push a config without weights."""
        trainer, strategy = self.trainer, self.trainer.args.hub_strategy
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not trainer.args.hub_always_push and not all(upload.done() for upload in self.uploads):
            return
        # One worker makes all uploads in turn, so that an older push never overtakes a newer one.
        message = f"Training in progress, step {trainer.state.global_step}"
        upload = partial(run_as_future, self._upload, folder, message)
        self.uploads.append(upload(_RESUME_ONLY))
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        if strategy in whole:
            self.uploads.append(upload([], path_in_repo=whole[strategy]))

    def push(self, message: str | None, blocking: bool, **options: str | None) -> CommitInfo | Future:
        """Pushes the output folder as one commit; returns the commit, or a future of it."""
        self.finish()
        upload = partial(self._upload, Path(self.trainer.args.output_dir), message, _NOT_PUSHED, **options)
        return upload() if blocking else run_as_future(upload)

    def _upload(self, folder: Path, message: str | None, ignored: list[str], **options: str | None) -> CommitInfo:
        args = self.trainer.args
        given = {name: value for name, value in options.items() if value is not None}
        options = {"token": args.hub_token, "revision": args.hub_revision, **given, "commit_message": message}
        return push_folder(folder, self.trainer.hub_model_id, ignore_patterns=ignored, **options)

    def finish(self) -> None:
        """Waits for the uploads in the background, and reports those that failed."""
        while self.uploads:
            error = self.uploads.pop(0).exception()
            if error is not None:
                logger.error(f"A push during training failed: {error}. Call push_to_hub() to push again.")
