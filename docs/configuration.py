# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Write reference/configuration.md from the fields of the configurations.

    python docs/configuration.py
"""

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl_distreward import PAPER, DiffusionDistributionConfig, DiffusionTrainerConfig, MergeCoefficientConfig
from trl_distreward.scripts.arguments import RewardArguments
from trl_distreward.scripts.merge import MergeArguments
from trl_distreward.scripts.train import TrainArguments

PAGE = Path(__file__).parent / "reference" / "configuration.md"
INTRODUCTION = """\
# Configuration

Every option of the two trainers and of the commands `train` and `merge`, written from the code by
`python docs/configuration.py`. An option is an argument of the configuration in Python, `--option` on the command line
and a key in a YAML file. Options of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) are not repeated, unless their
default differs.

`PAPER` holds the paper's settings ([arXiv 2607.02291](https://huggingface.co/papers/2607.02291)); where it differs
from the default, its value is listed too. Use it with `DiffusionDistributionConfig(output_dir="run", **PAPER)`.
"""
SECTIONS: dict[str, tuple[type, bool]] = {  # title: class, and whether it has values in PAPER
    "Training: DiffusionDistributionConfig": (DiffusionDistributionConfig, True),
    "Both trainers: DiffusionTrainerConfig": (DiffusionTrainerConfig, True),
    "Merging: MergeCoefficientConfig": (MergeCoefficientConfig, False),
    "Commands train and merge": (RewardArguments, False),
    "Command train": (TrainArguments, False),
    "Command merge": (MergeArguments, False),
}


def page() -> str:
    parts = [INTRODUCTION]
    for title, (cls, has_paper) in SECTIONS.items():
        own = inspect.get_annotations(cls)  # parsers rewrite the types of fields
        rows = [row(field, own[field.name], has_paper) for field in fields(cls) if field.name in own]
        parts.append(f"## {title}\n\n| option | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def row(field: Field, annotation: Any, has_paper: bool) -> str:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    shown = "required" if default is MISSING else f"`{default!r}`"
    if has_paper and str(PAPER.get(field.name, default)) != str(default):
        shown += f"; paper `{PAPER[field.name]!r}`"
    kind = annotation.__name__ if annotation in (bool, float, int, str) else str(annotation)
    kind = kind.replace(" | None", ", optional")
    meaning = field.metadata.get("help", "").replace("|", "\\|")
    return f"| `{field.name}` | {kind} | {shown} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
