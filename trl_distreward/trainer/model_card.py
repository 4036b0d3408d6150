# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from trl.trainer.base_config import _BaseConfig


def recipe_of(args: Any) -> dict[str, Any]:
    """The settings that make the result: those that the config adds to TRL's, and the optimizer's."""
    inherited = {field.name for field in fields(_BaseConfig)}
    own = [field.name for field in fields(args) if field.name not in inherited]
    optimizer = ["learning_rate", "lr_scheduler_type", "max_grad_norm", "seed", "bf16", "fp16"]
    return {name: getattr(args, name) for name in [*own, *optimizer]}


def build_model_card(
    name: str,
    *,
    trainer_name: str,
    paper: Mapping[str, str],
    num_updates: int,
    evaluations: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    num_eval_images: int,
    sections: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """
    Builds the card of a model called `name`. Of the evaluations (`step` and `values`), the first and the last become a
    table. `sections` are Markdown; `metadata` are further fields of [`~huggingface_hub.ModelCardData`].
    """
    results = [
        EvalResult(
            task_type=metadata.get("pipeline_tag", "unconditional-image-generation"),
            dataset_type="custom",
            dataset_name=f"{num_eval_images} generated images against the run's real data",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )
        for last in evaluations[-1:]
        for metric, value in last["values"].items()
    ]
    data = ModelCardData(model_name=name, eval_results=results or None, **metadata)
    lines = [
        f"# {name}",
        "",
        f"Fine-tuned with the `{trainer_name}` of trl-distreward, {num_updates} updates, after [{paper['title']}]"
        f"(https://huggingface.co/papers/{paper['id']}).",
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines += ["", "## Evaluation", "", f"| metric | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        before, after = first["values"], last["values"]
        lines += [f"| {name} | {before[name]:.4g} | {value:.4g} |" for name, value in after.items() if name in before]
    for section in sections:
        lines += ["", section]
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{setting}` | `{value}` |" for setting, value in recipe.items()]
    return ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n".join(lines) + "\n")
