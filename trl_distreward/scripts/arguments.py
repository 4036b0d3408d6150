# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Options of training and merging that choose rewards, metrics and conditions."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline

from ..conditions import TEXT_COLUMNS
from ..evaluation.image_metrics import FeatureDistance, ImageMetric, MeanScore
from ..evaluation.sources import ImageSource, open_images, read_dataset
from ..importing import resolve
from ..metrics.distance import DISTANCES
from ..metrics.extractors import load_feature_extractor
from ..rewards.per_image import clip_score, hps_score, pick_score
from ..rewards.subset_replace import SubsetReplaceReward
from ..trainer.base import DiffusionTrainer
from ..trainer.base_config import option
from .common import EXTRACTOR_HELP, find_extractor, split_spec

Model = str | DiffusionPipeline
Reward = SubsetReplaceReward | Callable[..., Any]
# rewards of single images by name
REWARDS: dict[str, Callable[..., Any]] = {"clip_score": clip_score, "pick_score": pick_score, "hps_score": hps_score}


@dataclass
class RewardArguments:
    """Options that choose the model, the rewards, the metrics and the conditions."""

    model: str = option(MISSING, "Folder or Hub id of the pipeline.")
    feature_extractor: str | None = option(None, f"Feature extractor of the distribution reward: {EXTRACTOR_HELP}.")
    real_statistics: str | None = option(
        None, "Statistics of real images, with features unless distance is frechet; or a folder of images."
    )
    real_images: str | None = option(None, "Folder, .npz or dataset of real images, in place of real_statistics.")
    real_split: str | None = option(None, "Split of real_images, if there are several.")
    real_resize: int | None = option(None, "Side to which real_images are cropped and resized.")
    prompt_encoder: str | None = option(
        None, "CLIP model whose embeddings of prompts join the features of images: its own without feature_extractor."
    )
    prompt_scale: float = option(1.0, "Factor of the embeddings of prompts.")
    distance: str = option("frechet", "Distance of the reward.", choices=list(DISTANCES))
    reward_funcs: list[str] = option(
        [], "Further rewards: clip_score, pick_score or hps_score, such as 'pick_score,source=ID', or dotted paths."
    )
    heldout_extractor: str | None = option(None, "Feature extractor for evaluation, which the reward does not use.")
    heldout_statistics: str | None = option(None, "Statistics file for heldout_extractor.")
    dataset_name: str | None = option(None, "Folder or Hub id of a dataset with class labels or prompts.")
    dataset_split: str = option("train", "Split of the dataset, if it has any.")
    prompt_column: str | None = option(
        None, "Column of prompts, in the dataset and in real_images; by default prompt, prompts, text or caption."
    )

    def __post_init__(self) -> None:
        extracts = self.feature_extractor is not None or self.prompt_encoder is not None
        if extracts != (self.real_statistics is not None or self.real_images is not None):
            needed = "feature_extractor or prompt_encoder, and real_statistics or real_images"
            raise ValueError(f"a distribution reward needs {needed}: give one of each, or none.")
        if not extracts and not self.reward_funcs:
            raise ValueError("there is no reward: give feature_extractor and real_statistics, or reward_funcs.")
        if (self.heldout_extractor is None) != (self.heldout_statistics is None):
            raise ValueError("heldout_extractor and heldout_statistics belong together: give both or none.")


def build_rewards(arguments: RewardArguments, **options: Any) -> list[Reward]:
    """Returns the reward functions; `options` go to the [`SubsetReplaceReward`]."""
    rewards = [find_reward(spec) for spec in arguments.reward_funcs]
    name, encoder = arguments.feature_extractor, arguments.prompt_encoder
    if name is not None or encoder is not None:
        extractor = find_extractor(name, encoder, arguments.prompt_scale)
        options |= {"distance": arguments.distance, "real_resize": arguments.real_resize}
        rewards.insert(0, SubsetReplaceReward(extractor, find_real_data(arguments), **options))
    return rewards


def find_reward(spec: str) -> Reward:
    """Returns the reward that `NAME[,option=value…]` or a dotted path names."""
    name, options = split_spec(spec)
    if name not in REWARDS and "." not in name:
        raise ValueError(f"reward {name!r} is unknown: choose one of {', '.join(REWARDS)}, or give a dotted path.")
    try:
        return REWARDS[name](**options) if name in REWARDS else resolve(name)
    except TypeError as error:
        raise ValueError(f"reward {spec!r} has wrong options: {error}.") from error


def find_real_data(arguments: RewardArguments) -> str | ImageSource | None:
    """Returns the statistics file of the reward's real data, or its images."""
    source, encoder = arguments.real_images, arguments.prompt_encoder
    if source is None:
        return arguments.real_statistics
    prompts = None if encoder is None else arguments.prompt_column or TEXT_COLUMNS
    return open_images(source, split=arguments.real_split, prompt_column=prompts)


def build_metrics(arguments: RewardArguments, rewards: list[Reward]) -> dict[str, ImageMetric]:
    """Returns metrics for evaluation: means of the rewards known by name, and the held-out distance."""
    named = [reward for reward in rewards if getattr(reward, "__name__", None) in REWARDS]
    metrics: dict[str, ImageMetric] = {reward.__name__: MeanScore(reward) for reward in named}
    if arguments.heldout_extractor is not None and arguments.heldout_statistics is not None:
        extractor = load_feature_extractor(arguments.heldout_extractor)
        metrics["heldout"] = FeatureDistance(extractor, arguments.heldout_statistics)
    return metrics


def load_conditions(arguments: RewardArguments) -> Dataset | None:
    """Loads the dataset of conditions; `prompt_column` becomes its only column of prompts."""
    if arguments.dataset_name is None:
        return None
    dataset, _ = read_dataset(arguments.dataset_name, arguments.dataset_split)
    column, names = arguments.prompt_column, dataset.column_names
    if column is None:
        return dataset
    if column not in names:
        raise ValueError(f"dataset {arguments.dataset_name} has no column {column!r}, but {', '.join(names)}.")
    dataset = dataset.remove_columns([name for name in names if name in TEXT_COLUMNS and name != column])
    return dataset if column == "prompt" else dataset.rename_column(column, "prompt")


def run_trainer(trainer: DiffusionTrainer, at_end: Callable[[], None] | None = None) -> None:
    """Trains, from a checkpoint if the options say so, then calls `at_end` and saves or pushes the model."""
    resume = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    if not trainer.interrupted:
        if at_end is not None:
            at_end()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()  # saves the model first
        else:
            trainer.save_model()
    elif trainer.is_world_process_zero():
        done, remedy = trainer.state.global_step, "to continue, add --resume_from_checkpoint true to the command"
        print(f"Stopped after step {done} of {trainer.state.max_steps}: {remedy if done else 'nothing was saved'}.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
