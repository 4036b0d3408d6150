# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pushing pipelines and their cards to the Hub, without anything that belongs to this machine."""

import os
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub import push_folder
from .checkpointing import RAW_WEIGHTS, TRAINING_STATE
from .model_card import build_model_card, recipe_of
from .run_record import RUN_RECORD

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

# Files of a checkpoint that only resuming needs; some are DeepSpeed's
_RESUME_ONLY = ["optimizer*", "global_step*", "latest", "zero_to_fp32.py", "scheduler.pt", "scaler.pt", "rng_state*"]
_RESUME_ONLY += ["trainer_state.json", "process_state*", RAW_WEIGHTS, TRAINING_STATE]
# Files of the output folder that name folders of this machine, or that are results of other runs
_NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", "trainer_state.json", RUN_RECORD, "*.html"]
_NOT_PUSHED += ["real_statistics.*", "*.work/*"]


class Publisher:
    """Pushes a trainer's output, and keeps the pushes that run in the background."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer
        self.uploads: list[Future] = []

    @property
    def model_name(self) -> str:
        args = self.trainer.args
        return Path(args.hub_model_id or args.output_dir).name

    def push_checkpoint(self, folder: Path) -> None:
        """Pushes a checkpoint's pipeline in the background; transformers would push a config without weights."""
        trainer, args = self.trainer, self.trainer.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and not all(upload.done() for upload in self.uploads):
            return
        targets = [(".", _RESUME_ONLY)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            targets.append(("last-checkpoint" if last else folder.name, []))
        for path_in_repo, ignored in targets:
            # One worker makes all uploads in turn, so that an older push never overtakes a newer one.
            message = f"Training in progress, step {trainer.state.global_step}"
            self.uploads.append(run_as_future(self._upload, folder, message, ignored, path_in_repo=path_in_repo))

    def _upload(
        self, folder: str | Path, message: str | None, ignored: list[str], token: str | None = None, **kwargs: Any
    ) -> CommitInfo:
        args = self.trainer.args
        options = {"token": token or args.hub_token, "revision": args.hub_revision, **kwargs}
        return push_folder(
            folder, self.trainer.hub_model_id, commit_message=message, ignore_patterns=ignored, **options
        )

    def push(self, message: str | None, blocking: bool, token: str | None, revision: str | None) -> Any:
        """Pushes the output folder as one commit; returns the commit, or a future of it."""
        self.finish()
        args = self.trainer.args
        upload = partial(
            self._upload, args.output_dir, message, _NOT_PUSHED, token, revision=revision or args.hub_revision
        )
        return upload() if blocking else run_as_future(upload)

    def finish(self) -> None:
        """Waits for the uploads in the background, and reports those that failed."""
        while self.uploads:
            error = self.uploads.pop(0).exception()
            if error is not None:
                logger.error(f"A push during training failed: {error}. Call push_to_hub() to push again.")

    def write_card(self, model_name: str | None, dataset_name: str | None, tags: Any, license: str | None) -> None:
        """Writes `README.md` with the settings and the evaluations."""
        trainer, args = self.trainer, self.trainer.args
        given = [tags] if isinstance(tags, str) else list(tags or [])
        source = getattr(getattr(trainer.policy, "pipeline", None), "config", {}).get("_name_or_path")
        base_model = source if source and source.count("/") == 1 and not os.path.isdir(source) else None
        metadata: dict[str, Any] = {"base_model": base_model, **trainer.card_metadata()}
        card = build_model_card(
            model_name or self.model_name,
            trainer_name=type(trainer).__name__,
            paper=trainer._paper,
            num_updates=trainer.weights_step,
            evaluations=[found for found in trainer.run_record.evaluations if found["step"] <= trainer.weights_step],
            recipe=recipe_of(args),
            num_eval_images=len(trainer.eval_conditions),
            sections=trainer.card_sections(),
            license=license,
            library_name="diffusers",
            pipeline_tag=trainer.pipeline_tag,
            datasets=dataset_name,
            tags=sorted({*given, *trainer._tag_names, "generated_from_trainer"}),
            **metadata,
        )
        card.save(os.path.join(args.output_dir, "README.md"))
