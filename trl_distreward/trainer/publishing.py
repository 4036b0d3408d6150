# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Pushing to the Hub, during a run and after it: a pipeline and its card, and nothing that is this machine's own.

`transformers.Trainer` would push a config without weights.
"""

import os
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub import push_folder, with_retries
from .checkpoints import RAW_WEIGHTS, TRAINING_STATE, CheckpointingTrainer
from .model_card import build_model_card, recipe_of
from .run_record import RUN_RECORD

logger = get_logger(__name__)

SKIPPED_FOLDER = "skipped"
# Files of a checkpoint that are for resuming only, and stay off the Hub.
_RESUME_ONLY = [
    "optimizer*",
    "global_step*",  # DeepSpeed's
    "latest",
    "zero_to_fp32.py",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    RAW_WEIGHTS,
    "process_state*",
    TRAINING_STATE,
]
# Of the output folder: what names folders of this machine, what a skipped update was made of, and others' results.
_NOT_PUSHED = [
    "_*",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    RUN_RECORD,
    "*.html",
    f"{SKIPPED_FOLDER}/*",
    "baselines/*",
    "real_statistics.*",
    "*.work/*",
]


class PublishingTrainer(CheckpointingTrainer):
    """
    A trainer whose pipelines go to the Hub.

    A subclass sets, besides, `_uploads`, those in the background, and `_holds_best`, whether the weights are of an
    earlier update than the last.
    """

    _uploads: list[Future]
    _holds_best: bool

    def _hub_name(self) -> str:
        return Path(self.args.hub_model_id or self.args.output_dir).name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the checkpoint's pipeline; transformers would push a config without weights."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and not all(upload.done() for upload in self._uploads):
            return
        uploads = [(".", _RESUME_ONLY)]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            uploads.append(("last-checkpoint", []))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            uploads.append((Path(checkpoint_folder).name, []))
        for path_in_repo, ignored in uploads:
            # by the one worker that all share, so that no older push overtakes a newer one
            upload = run_as_future(
                push_folder,
                checkpoint_folder,
                self.hub_model_id,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=ignored or None,
            )
            self._uploads.append(upload)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        name = self.args.hub_model_id or self._hub_name()
        with_retries(lambda: super(PublishingTrainer, self).init_hf_repo(token, private), f"creating {name}", name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Saves the pipeline and its card, and pushes them as one commit, again after failures that may pass.

        All processes call it, the main one pushes. Arguments as in [`~transformers.Trainer.push_to_hub`].

        Returns:
            [`~huggingface_hub.CommitInfo`], or a future of it where `blocking` is `False`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: nothing was committed.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=kwargs.pop("model_name", None), **kwargs)
        self._finish_current_push()
        push = partial(
            push_folder,
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            ignore_patterns=_NOT_PUSHED,
        )
        return push() if blocking else run_as_future(push)

    def _finish_current_push(self) -> None:
        """Waits for the uploads in the background; a failure is told, and the last push has all there is to push."""
        while self._uploads:
            error = self._uploads.pop(0).exception()
            if error is not None:
                logger.error(f"A push during training failed: {error}. Call push_to_hub() to push again.")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Writes `README.md` with the recipe and the last evaluation."""
        if not self.is_world_process_zero():
            return
        given = [tags] if isinstance(tags, str) else list(tags or [])
        source = getattr(getattr(self.policy, "pipeline", None), "config", {}).get("_name_or_path")
        base_model = source if source and source.count("/") == 1 and not os.path.isdir(source) else None
        name = model_name or self._hub_name()
        updates = self.state.best_global_step if self._holds_best else self.state.global_step
        metadata: dict[str, Any] = {"base_model": base_model, **self._card_metadata()}
        card = build_model_card(
            name,
            trainer_name=type(self).__name__,
            paper=self._paper,
            num_updates=updates,
            evaluations=[
                found
                for found in self.run_record.evaluations
                if "of" not in found and found["seed"] == self.args.eval_seed and found["step"] <= updates
            ],
            recipe=recipe_of(self.args),
            num_eval_images=len(self.eval_conditions),
            sections=self._card_sections(),
            license=kwargs.get("license"),
            library_name="diffusers",
            pipeline_tag=self._pipeline_tag,
            datasets=dataset_name,
            tags=sorted({*given, *self._tag_names, "generated_from_trainer"}),
            **metadata,
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _card_metadata(self) -> dict[str, Any]:
        """Further metadata of the model card, by the names of [`~huggingface_hub.ModelCardData`]."""
        return {}

    def _card_sections(self) -> list[str]:
        """Further sections of the model card, in Markdown."""
        return []

    _pipeline_tag = "unconditional-image-generation"
