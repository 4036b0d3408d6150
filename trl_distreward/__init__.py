# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Post-train diffusion and flow-matching image generators on distribution-wise rewards."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# Public names by module; a module is imported when one of its names is first asked for
_PUBLIC = {
    "generation": ["SamplingSchedule", "generate_images"],
    "merging.coefficients": ["EMANet"],
    "merging.pool": ["CheckpointPool"],
    "metrics.clip": ["JointTextFeatures", "load_clip"],
    "metrics.extractors": ["JointFeatures", "load_feature_extractor"],
    "metrics.frechet": ["FrechetDistance", "frechet_distance"],
    "evaluation.image_metrics": ["FeatureDistance"],
    "metrics.inception": ["InceptionV3", "load_inception"],
    "metrics.kernel": ["KernelDistance"],
    "metrics.prdc": ["precision_recall_density_coverage"],
    "metrics.scores": ["feature_metrics"],
    "metrics.statistics": ["FeatureStatistics"],
    "models.edm2": ["EDM2UNet2DModel"],
    "models.sit": ["SiTTransformer2DModel"],
    "pipelines.edm2": ["EDM2Pipeline"],
    "pipelines.sit": ["SiTPipeline"],
    "policies": ["ClassConditionalPolicy", "DiffusionPolicy", "as_policy", "load_pipeline"],
    "rewards.subset_replace": ["SubsetReplaceReward"],
    "trainer.base_config": ["DiffusionTrainerConfig"],
    "trainer.callbacks": ["LogSamplesCallback"],
    "trainer.diffusion_distribution_config": ["PAPER", "DiffusionDistributionConfig"],
    "trainer.distribution_reward_trainer": ["DistributionRewardTrainer"],
    "trainer.dry_run": ["check_disk", "dry_run"],
    "trainer.merge_coefficient_config": ["MergeCoefficientConfig"],
    "trainer.merge_coefficient_trainer": ["MergeCoefficientTrainer"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # for type checkers and editors
    from .evaluation.image_metrics import FeatureDistance as FeatureDistance
    from .generation import SamplingSchedule as SamplingSchedule
    from .generation import generate_images as generate_images
    from .merging.coefficients import EMANet as EMANet
    from .merging.pool import CheckpointPool as CheckpointPool
    from .metrics.clip import JointTextFeatures as JointTextFeatures
    from .metrics.clip import load_clip as load_clip
    from .metrics.extractors import JointFeatures as JointFeatures
    from .metrics.extractors import load_feature_extractor as load_feature_extractor
    from .metrics.frechet import FrechetDistance as FrechetDistance
    from .metrics.frechet import frechet_distance as frechet_distance
    from .metrics.inception import InceptionV3 as InceptionV3
    from .metrics.inception import load_inception as load_inception
    from .metrics.kernel import KernelDistance as KernelDistance
    from .metrics.prdc import precision_recall_density_coverage as precision_recall_density_coverage
    from .metrics.scores import feature_metrics as feature_metrics
    from .metrics.statistics import FeatureStatistics as FeatureStatistics
    from .models.edm2 import EDM2UNet2DModel as EDM2UNet2DModel
    from .models.sit import SiTTransformer2DModel as SiTTransformer2DModel
    from .pipelines.edm2 import EDM2Pipeline as EDM2Pipeline
    from .pipelines.sit import SiTPipeline as SiTPipeline
    from .policies import ClassConditionalPolicy as ClassConditionalPolicy
    from .policies import DiffusionPolicy as DiffusionPolicy
    from .policies import as_policy as as_policy
    from .policies import load_pipeline as load_pipeline
    from .rewards.subset_replace import SubsetReplaceReward as SubsetReplaceReward
    from .trainer.base_config import DiffusionTrainerConfig as DiffusionTrainerConfig
    from .trainer.callbacks import LogSamplesCallback as LogSamplesCallback
    from .trainer.diffusion_distribution_config import PAPER as PAPER
    from .trainer.diffusion_distribution_config import DiffusionDistributionConfig as DiffusionDistributionConfig
    from .trainer.distribution_reward_trainer import DistributionRewardTrainer as DistributionRewardTrainer
    from .trainer.dry_run import check_disk as check_disk
    from .trainer.dry_run import dry_run as dry_run
    from .trainer.merge_coefficient_config import MergeCoefficientConfig as MergeCoefficientConfig
    from .trainer.merge_coefficient_trainer import MergeCoefficientTrainer as MergeCoefficientTrainer


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
