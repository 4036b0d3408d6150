# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained pipeline: what it was made from, how, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from trl.trainer.base_config import _BaseConfig


def recipe_of(args: Any) -> dict[str, Any]:
    """The settings that make the result: those a config adds to TRL's, and the optimizer's."""
    inherited = {field.name for field in fields(_BaseConfig)}
    own = [field.name for field in fields(args) if field.name not in inherited]
    optimizer = ["learning_rate", "lr_scheduler_type", "max_grad_norm", "seed", "bf16", "fp16"]
    return {name: getattr(args, name) for name in [*own, *optimizer]}


def evaluations_in(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Every evaluation of a run, oldest first: its step, and its metrics by their names without prefix."""
    evaluations = []
    for entry in log_history:
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
        }
        if metrics:
            evaluations.append({"step": entry["step"], **metrics})
    return evaluations


def build_model_card(
    name: str,
    *,
    trainer_name: str,
    paper: Mapping[str, str],
    log_history: Sequence[Mapping[str, float]],
    recipe: Mapping[str, Any],
    num_eval_images: int,
    sections: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """
    Args:
        name (`str`): of the model.
        trainer_name (`str`), paper (`dict`): with `title` and `id`, named in the first sentence.
        log_history (`list[dict]`): of the run; its first and last evaluations become a table, the last one results.
        recipe (`dict`): settings to list.
        num_eval_images (`int`): images of an evaluation.
        sections (`list[str]`, *optional*): further sections, in Markdown, before the recipe.
        metadata: further fields of [`~huggingface_hub.ModelCardData`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    evaluations = evaluations_in(log_history)
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
        for metric, value in last.items()
        if metric != "step"
    ]
    data = ModelCardData(model_name=name, eval_results=results or None, **metadata)
    steps = max((entry["step"] for entry in log_history), default=0)
    lines = [
        f"# {name}",
        "",
        f"Fine-tuned with the `{trainer_name}` of trl-distreward, {steps:.0f} updates, after [{paper['title']}]"
        f"(https://huggingface.co/papers/{paper['id']}).",
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines += ["", "## Evaluation", "", f"| metric | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        lines += [f"| {k} | {first[k]:.4g} | {last[k]:.4g} |" for k in last if k != "step" and k in first]
    for section in sections:
        lines += ["", section]
    lines += ["", "## Recipe", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{setting}` | `{value}` |" for setting, value in recipe.items()]
    return ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n".join(lines) + "\n")
