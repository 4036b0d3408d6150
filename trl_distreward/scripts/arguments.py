# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: a model, what judges it, and conditions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..evaluation.datasets import read_dataset
from ..importing import resolve
from ..metrics.distance import DISTANCES
from ..metrics.extractors import load_feature_extractor
from ..metrics.image_metrics import FeatureDistance, ImageMetric, MeanScore
from ..metrics.statistics import FeatureStatistics
from ..rewards.per_image import clip_score, hps_score, pick_score
from ..rewards.subset_replace import SubsetReplaceReward
from ..trainer.base_config import DiffusionTrainerConfig
from . import statistics
from .common import beside_prompts, split_spec

# Rewards of single images by name
REWARDS: dict[str, Callable[..., Any]] = {
    "clip_score": clip_score,
    "pick_score": pick_score,
    "hps_score": hps_score,
}


@dataclass
class RewardArguments:
    """What is trained, on what reward, and what is watched."""

    # what is needed, one of each key, for options to do anything
    idle_without: ClassVar[dict[tuple[str, ...], tuple[str, ...]]] = {
        ("prompt_encoder",): ("prompt_scale",),
        ("feature_extractor", "prompt_encoder"): ("distance",),
        ("real_images",): ("real_resize", "real_split"),
        ("dataset_name",): ("dataset_split",),
        ("dataset_name", "real_images"): ("prompt_column",),
    }

    model: str = field(metadata={"help": "Folder or Hub id of the pipeline."})
    feature_extractor: str | None = field(
        default=None,
        metadata={
            "help": "The reward's feature extractor: inception, dinov2, clip, a Hub id or a folder of a vision "
            "backbone, or a dotted path, e.g. 'my_package.features.extract'."
        },
    )
    real_statistics: str | None = field(
        default=None,
        metadata={
            "help": "Statistics file of real data in that extractor's features; for other distances than frechet, "
            "a .safetensors file of the features. Where real_images are given, what is computed of them is kept here."
        },
    )
    real_images: str | None = field(
        default=None,
        metadata={
            "help": "Images to compute real_statistics of, once: a folder, an .npz or a dataset; kept in output_dir "
            "unless real_statistics names another file."
        },
    )
    real_split: str | None = field(
        default=None, metadata={"help": "Split of that dataset; train, for one that is streamed from the Hub."}
    )
    real_resize: int | None = field(
        default=None, metadata={"help": "Crop the centre of real images and resize it to so many pixels a side."}
    )
    prompt_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a CLIP model: its embeddings of prompts are put beside the features of "
            "images, which are its own if there is no feature_extractor."
        },
    )
    prompt_scale: float = field(default=1.0, metadata={"help": "Factor of the embeddings of prompts."})
    distance: str = field(
        default="frechet", metadata={"help": "Distance of the reward.", "choices": sorted(DISTANCES)}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Further reward functions: clip_score, pick_score or hps_score, with options after commas, e.g. "
            "'pick_score,source=FOLDER_OR_ID', or dotted paths, e.g. 'my_package.my_reward'."
        },
    )
    heldout_extractor: str | None = field(
        default=None, metadata={"help": "An extractor that the reward does not see, to evaluate; named likewise."}
    )
    heldout_statistics: str | None = field(default=None, metadata={"help": "Statistics file for it."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a folder, with a column 'class_labels' or 'prompt'."}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts, in the dataset and in real_images."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    log_samples: bool = field(default=True, metadata={"help": "Write grids of samples."})

    def __post_init__(self) -> None:
        of_sets = self.feature_extractor is not None or self.prompt_encoder is not None
        if of_sets != (self.real_statistics is not None or self.real_images is not None):
            raise ValueError(
                "feature_extractor or prompt_encoder goes together with real_statistics or real_images: give both or "
                "neither."
            )
        if not of_sets and not self.reward_funcs:
            raise ValueError(
                "there is no reward: give feature_extractor or prompt_encoder, with real_statistics or real_images, "
                "or reward_funcs."
            )
        if self.prompt_encoder is not None and self.dataset_name is None:
            raise ValueError(
                f"prompt_encoder={self.prompt_encoder!r} without prompts: give dataset_name, a dataset with a column "
                "of prompts."
            )
        if (self.heldout_extractor is None) != (self.heldout_statistics is None):
            raise ValueError("heldout_extractor and heldout_statistics go together: give both or neither.")
        for spec in self.reward_funcs:
            check_reward(spec)
        self._check_idle()

    def _check_idle(self) -> None:
        """Raises `ValueError` for options that say how something is used which is not there."""
        defaults = {option.name: option.default for option in fields(self)}
        for need, options in self.idle_without.items():
            changed = [name for name in options if getattr(self, name) != defaults[name]]
            if changed and not any(getattr(self, name) for name in need):
                raise ValueError(
                    f"{changed[0]}={getattr(self, changed[0])!r} does nothing without {' or '.join(need)}: give "
                    "that, or leave it out."
                )


def build_rewards(arguments: RewardArguments, output_dir: str, **options: Any) -> list[Any]:
    """The reward functions; `options` go to the [`SubsetReplaceReward`]. Statistics may be computed first."""
    name, encoder = arguments.feature_extractor, arguments.prompt_encoder
    rewards = [find_reward(spec) for spec in arguments.reward_funcs]
    if name is not None or encoder is not None:
        extractor: Any = None if name is None else load_feature_extractor(name)
        reward = SubsetReplaceReward(
            extractor if encoder is None else beside_prompts(extractor, encoder, arguments.prompt_scale),
            find_real_statistics(arguments, output_dir),
            arguments.distance,
            **options,
        )
        rewards.insert(0, reward)
    return rewards


def shown_sampler(config: DiffusionTrainerConfig) -> str:
    """The sampler of the grids of samples: the ODE if it is evaluated."""
    return "ode" if "ode" in config.eval_samplers else config.eval_samplers[0]


def find_reward(spec: str) -> Any:
    """A reward of single images by its name, `NAME[,option=value…]`, or the object at a dotted path."""
    name, options = check_reward(spec)
    return REWARDS[name](**options) if name in REWARDS else resolve(name)


def check_reward(spec: str) -> tuple[str, dict[str, str]]:
    """
    Name and options of a reward.

    Raises:
        ValueError: no such name, or options that it has not or lacks.
    """
    name, options = split_spec(spec)
    if name not in REWARDS:
        if "." not in name:
            raise ValueError(f"reward {name!r} is unknown: give one of {', '.join(REWARDS)}, or a dotted path.")
        if options:
            raise ValueError(f"{name} is a function of your own: it takes no {', '.join(options)}.")
        return name, options
    parameters = inspect.signature(REWARDS[name]).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    required = [p.name for p in parameters if p.name in own and p.default is p.empty]
    known = [*own, "tokenizer", "revision", "resize"]
    if odd := [key for key in options if key not in known]:
        raise ValueError(f"{spec!r} has no option {', '.join(odd)}: {name} takes {', '.join(known)}.")
    if lacking := [key for key in required if not options.get(key)]:
        raise ValueError(f"{spec!r} lacks {', '.join(lacking)}: write '{name},{lacking[0]}=…'.")
    return name, options


def find_real_statistics(arguments: RewardArguments, output_dir: str) -> str | None:
    """
    The statistics file of real data: the one that was given, or that of `real_images`, computed where there is none.

    Raises:
        ValueError: the file is of other images.
    """
    images = arguments.real_images
    if images is None:
        return arguments.real_statistics
    path = Path(arguments.real_statistics or Path(output_dir) / "real_statistics.safetensors")
    is_dataset = not Path(images).exists() and Path(images).suffix != ".npz"
    split = arguments.real_split or ("train" if is_dataset else None)
    if path.is_file():
        _check_of_images(path, arguments, split)
        return str(path)
    options = ["--output", str(path)]
    if arguments.feature_extractor is not None:
        options += ["--feature-extractor", arguments.feature_extractor]
    if arguments.prompt_encoder is not None:
        options += ["--prompt-encoder", arguments.prompt_encoder, "--prompt-scale", str(arguments.prompt_scale)]
        options += ["--prompt-column", arguments.prompt_column]
    if arguments.real_resize is not None:
        options += ["--resize", str(arguments.real_resize)]
    if arguments.distance != "frechet":
        options += ["--features"]
    options += [] if split is None else ["--split", split]
    options += ["--streaming"] if is_dataset else []
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics.main([images, *options])
    return str(path)


def _check_of_images(path: Path, arguments: RewardArguments, split: str | None) -> None:
    """Raises `ValueError` where a file is not of `real_images` as the options have them."""
    held = FeatureStatistics.load(path).metadata
    source, images = held.get("source"), arguments.real_images
    if source is None or Path(source) != Path(str(images)):  # "images" and "images/" are the same
        raise ValueError(
            f"{path} is of {source}, not of real_images={images!r}: name another file as real_statistics, or leave "
            "real_images out."
        )
    resize = None if arguments.real_resize is None else str(arguments.real_resize)
    asked = {"real_resize": ("image_resize", resize)}
    if split is not None:
        asked["real_split"] = ("split", split)
    if arguments.prompt_encoder is not None:
        asked["prompt_column"] = ("prompt_column", arguments.prompt_column)
    for option, (name, value) in asked.items():
        if held.get(name) != value:
            raise ValueError(
                f"{path} was made with {option}={held.get(name)}, not {value}: remove it to have it made anew, name "
                "another file as real_statistics, or leave real_images out."
            )


def build_metrics(arguments: RewardArguments, rewards: list[Any]) -> dict[str, ImageMetric]:
    """Means of the rewards of single images that are known by name, and the held-out metric if one is asked for."""
    named = [reward for reward in rewards if getattr(reward, "__name__", None) in REWARDS]
    metrics: dict[str, ImageMetric] = {reward.__name__: MeanScore(reward) for reward in named}
    if arguments.heldout_extractor is not None:
        extractor = load_feature_extractor(arguments.heldout_extractor)
        metrics["heldout"] = FeatureDistance(extractor, arguments.heldout_statistics)
    return metrics


def load_conditions(arguments: RewardArguments) -> Any:
    """
    The dataset of conditions, if one is named.

    Raises:
        OSError: it is neither here nor to be had.
        ValueError: it lacks the split, or the column of prompts.
    """
    name, split, column = arguments.dataset_name, arguments.dataset_split, arguments.prompt_column
    if name is None:
        return None
    dataset = read_dataset(name)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"dataset_split={split!r} is not in {name}, which has {', '.join(dataset)}.")
        dataset = dataset[split]
    elif split != "train":
        raise ValueError(f"dataset_split={split!r}: {name} has no splits: leave it out.")
    names = dataset.column_names
    if column not in names and "class_labels" not in names:
        raise ValueError(
            f"the dataset {name} has columns {names}, none of them {column!r}: name that of the prompts as "
            "prompt_column, or have class labels in a column 'class_labels'."
        )
    if column == "prompt" or column not in names:
        return dataset
    return dataset.remove_columns([c for c in ("prompt",) if c in names]).rename_column(column, "prompt")
