# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Model cards, and pushes to the Hub without anything that belongs to this machine."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, EvalResult, ModelCard, ModelCardData, run_as_future
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from trl.trainer.base_config import _BaseConfig

from ..hub import push_folder
from .checkpointing import RAW_WEIGHTS, TRAINING_STATE
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
# Settings that the configuration inherits, and that make the result as much as its own
_OPTIMIZER = ("learning_rate", "lr_scheduler_type", "max_grad_norm", "seed", "bf16", "fp16")


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
        options = {"token": args.hub_token, "revision": args.hub_revision, **given}
        repository = self.trainer.hub_model_id
        return push_folder(folder, repository, commit_message=message, ignore_patterns=ignored, **options)

    def finish(self) -> None:
        """Waits for the uploads in the background, and reports those that failed."""
        while self.uploads:
            error = self.uploads.pop(0).exception()
            if error is not None:
                logger.error(f"A push during training failed: {error}. Call push_to_hub() to push again.")


def write_model_card(
    trainer: "DiffusionTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] = (),
    license: str | None = None,
    **_: object,
) -> None:
    """Writes `README.md`: the first and the last evaluation, the trainer's own sections, and the settings."""
    args, paper = trainer.args, trainer._paper
    title = model_name or Path(args.hub_model_id or args.output_dir).name
    prompts = trainer.policy.num_conditions is None
    pipeline_tag = "text-to-image" if prompts else "unconditional-image-generation"
    evaluations = [found for found in trainer.run_record.evaluations if found["step"] <= trainer.weights_step]
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type="custom",
            dataset_name=f"{len(trainer.eval_conditions)} generated images against the run's real data",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )
        for last in evaluations[-1:]
        for metric, value in last["values"].items()
    ]
    source = getattr(getattr(trainer.policy, "pipeline", None), "config", {}).get("_name_or_path")
    from_hub = source and source.count("/") == 1 and not os.path.isdir(source)  # a path belongs to this machine
    given = [tags] if isinstance(tags, str) else tags
    metadata, sections = trainer.card_parts()
    data = ModelCardData(
        model_name=title,
        eval_results=results or None,
        license=license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        datasets=dataset_name,
        tags=sorted({*given, *trainer._tag_names, "generated_from_trainer"}),
        **{"base_model": source if from_hub else None, **metadata},
    )
    trained = f"Fine-tuned with the `{type(trainer).__name__}` of trl-distreward, {trainer.weights_step} updates"
    lines = [f"# {title}", "", f"{trained}, after [{paper['title']}](https://huggingface.co/papers/{paper['id']})."]
    if evaluations:
        shown = [evaluations[0], evaluations[-1]]
        values = [each["values"] for each in shown]
        rows = [[name, *(f"{each[name]:.4g}" for each in values)] for name in values[1] if name in values[0]]
        lines += ["", "## Evaluation", "", table(["metric", *(f"step {each['step']}" for each in shown)], rows)]
    for section in sections:
        lines += ["", section]
    inherited = {field.name for field in fields(_BaseConfig)}
    settings = [*(field.name for field in fields(args) if field.name not in inherited), *_OPTIMIZER]
    rows = [[f"`{name}`", f"`{getattr(args, name)}`"] for name in settings]
    lines += ["", "## Settings", "", table(["setting", "value"], rows)]
    card = ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n".join(lines) + "\n")
    card.save(os.path.join(args.output_dir, "README.md"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def comparison_table(comparison: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each merge, from the same noise; a column for each metric."""
    metrics = list(next(iter(comparison.values())))
    rows = [[name, *(f"{values[metric]:.4g}" for metric in metrics)] for name, values in comparison.items()]
    return table(["merge", *metrics], rows)
