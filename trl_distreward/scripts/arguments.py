# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: a model, what judges it, and conditions."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset

from ..importing import resolve
from ..metrics.distances import DISTANCES
from ..metrics.features import load_feature_extractor
from ..metrics.report import FeatureDistance
from ..rewards.subset_replace import SubsetReplaceReward


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description as they are."""


@dataclass
class RewardArguments:
    """What is trained, on what reward, and what is watched."""

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
            "a .safetensors file of the features."
        },
    )
    distance: str = field(
        default="frechet", metadata={"help": "Distance of the reward.", "choices": sorted(DISTANCES)}
    )
    debias: bool = field(default=False, metadata={"help": "Extrapolate the distance to an infinite generated set."})
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Dotted paths of further reward functions, e.g. 'my_package.aesthetic'."},
    )
    heldout_extractor: str | None = field(
        default=None, metadata={"help": "An extractor that the reward does not see, to evaluate; named likewise."}
    )
    heldout_statistics: str | None = field(default=None, metadata={"help": "Statistics file for it."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a folder, with a column 'class_labels' or 'prompt'."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})


def build_rewards(arguments: RewardArguments, **options: Any) -> list[Any]:
    """The reward functions; `options` go to the [`SubsetReplaceReward`]."""
    rewards: list[Any] = [resolve(path) for path in arguments.reward_funcs]
    if (arguments.feature_extractor is None) != (arguments.real_statistics is None):
        raise ValueError("feature_extractor and real_statistics go together: give both or neither.")
    if arguments.feature_extractor is not None:
        reward = SubsetReplaceReward(
            load_feature_extractor(arguments.feature_extractor),
            arguments.real_statistics,
            arguments.distance,
            debias=arguments.debias,
            **options,
        )
        rewards.insert(0, reward)
    if not rewards:
        raise ValueError("there is no reward: give feature_extractor and real_statistics, or reward_funcs.")
    return rewards


def build_metrics(arguments: RewardArguments) -> dict[str, FeatureDistance]:
    """The held-out metric, if one is asked for."""
    if (arguments.heldout_extractor is None) != (arguments.heldout_statistics is None):
        raise ValueError("heldout_extractor and heldout_statistics go together: give both or neither.")
    if arguments.heldout_extractor is None:
        return {}
    return {
        "heldout": FeatureDistance(load_feature_extractor(arguments.heldout_extractor), arguments.heldout_statistics)
    }


def load_conditions(arguments: RewardArguments) -> Any:
    """The dataset of conditions, if one is named."""
    if arguments.dataset_name is None:
        return None
    return load_dataset(arguments.dataset_name, split=arguments.dataset_split)
