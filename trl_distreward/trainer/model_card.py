# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The model card: what was trained, from what and by which reward, the evaluations, and code that loads the result."""

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from trl.trainer.base_config import _BaseConfig

from ..merging.adapters import ADAPTER_FOLDER
from ..policies import diffusers_loads_adapter, source_of
from .run_record import sample_grids

if TYPE_CHECKING:
    from .base import DiffusionTrainer

# Settings that the configuration inherits, and that make the result as much as its own
_OPTIMIZER = ("learning_rate", "lr_scheduler_type", "max_grad_norm", "seed", "bf16", "fp16")
_LARGEST_GRID = 2**20  # bytes of a grid of samples that the card shows


def write_model_card(
    trainer: "DiffusionTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] = (),
    license: str | None = None,
    folder: str | os.PathLike | None = None,
    **_: object,
) -> None:
    """Writes `README.md` into `folder`, by default the output folder; it names no folder of this machine."""
    args, base = trainer.args, _base_model(trainer)
    folder = Path(folder or args.output_dir)
    name = trainer.hub_model_id or args.hub_model_id or folder.resolve().name
    title = model_name or name.rpartition("/")[2]
    prompts = trainer.policy.num_conditions is None
    pipeline_tag = "text-to-image" if prompts else "unconditional-image-generation"
    evaluations = [found for found in trainer.run_record.evaluations if found["step"] <= trainer.weights_step]
    about = f"{trainer.num_eval_images} generated images against the run's real data"
    results = [
        EvalResult(pipeline_tag, "custom", about, metric_type=name, metric_name=name, metric_value=round(value, 6))
        for last in evaluations[-1:]
        for name, value in last["values"].items()
    ]
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
        **{"base_model": base, **metadata},
    )
    parts: list[str | None] = [f"# {plain(title)}", _summary(trainer, base), _reward_section(trainer)]
    if evaluations:
        parts.append(_evaluation_section(evaluations))
    parts += [_sample_section(folder), _usage_section(trainer, base, name), *sections]
    inherited = {field.name for field in fields(_BaseConfig)}
    settings = [*(field.name for field in fields(args) if field.name not in inherited), *_OPTIMIZER]
    rows = [[code(name), code(getattr(args, name))] for name in settings]
    parts.append("## Settings\n\n" + table(["setting", "value"], rows))
    card = ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")
    card.save(folder / "README.md")


def _base_model(trainer: "DiffusionTrainer") -> str | None:
    """The Hub id of the model that training began from; `None` for a folder, which belongs to this machine."""
    source = source_of(trainer.policy)
    return source if source and source.count("/") == 1 and not os.path.isdir(source) else None


def _summary(trainer: "DiffusionTrainer", base: str | None) -> str:
    model, paper = trainer.describe_run()["model"], trainer._paper
    source = f"[{base}](https://huggingface.co/{base})" if base else f"a `{model['pipeline']}`"
    size = f"{model['trained']:,} trained numbers (its `{model['network']}` has {model['parameters']:,} parameters)"
    return (
        f"Made from {source} with the `{type(trainer).__name__}` of trl-distreward: {trainer.weights_step} updates of "
        f"{size}, after [{paper['title']}](https://huggingface.co/papers/{paper['id']})."
    )


def _reward_section(trainer: "DiffusionTrainer") -> str:
    rows = []
    for reward in trainer.rewards.all:
        function, cells = reward.function, [code(reward.name), f"{reward.weight:g}"]
        if not reward.of_sets:
            rows.append([*cells, "single images", "", ""])
            continue
        for space, extractor in function.extractors.items():
            name = getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__))
            shown = os.path.basename(name) if os.path.exists(name) else name
            distance, share = type(function.distances[space]).__name__, f"{function.space_weights[space]:g}"
            rows.append([*cells, f"{code(space)}: {code(shown)}", code(distance), share])
    return "## Reward\n\n" + table(["reward", "weight", "features", "distance from real images", "share"], rows)


def _evaluation_section(evaluations: Sequence[Mapping]) -> str:
    first, last = evaluations[0], evaluations[-1]
    shown = [first] if first is last else [first, last]
    common = [metric for metric in last["values"] if metric in first["values"]]
    rows = [[plain(metric), *(f"{each['values'][metric]:.4g}" for each in shown)] for metric in common]
    return "## Evaluation\n\n" + table(["metric", *(f"step {each['step']}" for each in shown)], rows)


def _sample_section(folder: Path) -> str | None:
    """The first and the last grid of samples, if they are small."""
    grids = sample_grids(folder)
    if len(grids) < 2 or max(grid.stat().st_size for grid in grids) > _LARGEST_GRID:
        return None
    shown = [f"![{grid.stem}](samples/{grid.name})" for grid in grids]
    return "## Samples\n\nFrom the same noise, before and after:\n\n" + " ".join(shown)


def _usage_section(trainer: "DiffusionTrainer", base: str | None, name: str) -> str | None:
    """Code that loads the model and makes an image; `None` for a pipeline that neither library knows."""
    pipeline, args = getattr(trainer.policy, "pipeline", None), trainer.args
    library = type(pipeline).__module__.partition(".")[0]
    loaders = {"diffusers": "DiffusionPipeline.from_pretrained", "trl_distreward": "load_pipeline"}
    loader = loaders.get(library)
    adapted = base and diffusers_loads_adapter(pipeline, trainer.network)
    alone = getattr(trainer.network, "hf_quantizer", None) is not None  # saved without the pipeline
    if loader is None or (alone and not adapted):
        return None
    lines = [f"from {library} import {loader.partition('.')[0]}", ""]
    lines.append(f"pipeline = {loader}({json.dumps(base if adapted else name)})")
    if adapted:
        file = f'subfolder="{ADAPTER_FOLDER}", weight_name="pytorch_lora_weights.safetensors"'
        lines.append(f"pipeline.load_lora_weights({json.dumps(name)}, {file})")
    schedules, (height, width) = args.eval_schedules, getattr(trainer.policy, "size", (None, None))
    steps = schedules.get("ode", next(iter(schedules.values()))).num_steps
    values = {"prompt": "a photo of a cat", "class_labels": [0], "height": height, "width": width}
    values |= {"num_inference_steps": steps, "guidance_scale": args.guidance_scale}
    known = inspect.signature(type(pipeline).__call__).parameters
    call = ", ".join(f"{key}={value!r}" for key, value in values.items() if key in known and value is not None)
    if "class_labels" in known or (trainer.policy.num_conditions or 1) == 1:
        lines += [f"image = pipeline({call}).images[0]", 'image.save("image.png")']
    else:  # diffusers' own call takes no labels
        schedule = f'SamplingSchedule({values["num_inference_steps"]}, sampler="ode")'
        lines = ["from trl_distreward import SamplingSchedule, as_policy, generate_images", ""]
        lines += [f"policy = as_policy({json.dumps(name)})"]
        lines += [f"images, _ = next(generate_images(policy, [0], {schedule}))  # uint8 (1, C, H, W)"]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def plain(text: object) -> str:
    """Text from outside, for Markdown that shows it as it is."""
    return re.sub(r"([\\`*\[\]<>&|#~])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Text from outside as code in Markdown, in which backticks would end."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def comparison_table(comparison: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each merge, from the same noise; a column for each metric."""
    metrics = list(next(iter(comparison.values())))
    rows = [[plain(name), *(f"{values[metric]:.4g}" for metric in metrics)] for name, values in comparison.items()]
    return table(["merge", *map(plain, metrics)], rows)
