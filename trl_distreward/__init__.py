# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Post-train diffusion and flow-matching image generators on distribution-wise rewards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "CheckpointPool": "merging.pool",
    "ClassConditionalPolicy": "policies",
    "DebiasedDistance": "metrics.composite",
    "DiffusionDistributionConfig": "trainer.diffusion_distribution_config",
    "DiffusionPolicy": "policies",
    "DiffusionTrainerConfig": "trainer.base_config",
    "DistributionRewardTrainer": "trainer.distribution_reward_trainer",
    "EDM2Pipeline": "pipelines.edm2",
    "EDM2UNet2DModel": "models.edm2",
    "EMANet": "merging.coefficients",
    "FeatureDistance": "metrics.image_metrics",
    "FeatureStatistics": "metrics.statistics",
    "FrechetDistance": "metrics.frechet",
    "InceptionV3": "metrics.inception",
    "JointFeatures": "metrics.extractors",
    "JointTextFeatures": "metrics.clip",
    "KernelDistance": "metrics.kernel",
    "LogSamplesCallback": "trainer.callbacks",
    "MergeCoefficientConfig": "trainer.merge_coefficient_config",
    "MergeCoefficientTrainer": "trainer.merge_coefficient_trainer",
    "PAPER": "trainer.diffusion_distribution_config",
    "SiTPipeline": "pipelines.sit",
    "SiTTransformer2DModel": "models.sit",
    "SubsetReplaceReward": "rewards.subset_replace",
    "as_policy": "policies",
    "check_resources": "trainer.dry_run",
    "dry_run": "trainer.dry_run",
    "feature_metrics": "metrics.scores",
    "frechet_distance": "metrics.frechet",
    "load_clip": "metrics.clip",
    "load_feature_extractor": "metrics.extractors",
    "load_inception": "metrics.inception",
    "load_pipeline": "policies",
    "precision_recall_density_coverage": "metrics.prdc",
}
_SUBMODULES = {
    "conditions",
    "conversion",
    "evaluation",
    "generation",
    "hub",
    "merging",
    "metrics",
    "models",
    "pipelines",
    "policies",
    "rewards",
    "run_report",
    "sampling",
    "scripts",
    "trainer",
}

__all__ = [
    "CheckpointPool",
    "ClassConditionalPolicy",
    "DiffusionDistributionConfig",
    "DiffusionPolicy",
    "DiffusionTrainerConfig",
    "DistributionRewardTrainer",
    "EDM2Pipeline",
    "EDM2UNet2DModel",
    "EMANet",
    "FeatureDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "JointFeatures",
    "JointTextFeatures",
    "KernelDistance",
    "LogSamplesCallback",
    "MergeCoefficientConfig",
    "MergeCoefficientTrainer",
    "PAPER",
    "SiTPipeline",
    "SiTTransformer2DModel",
    "SubsetReplaceReward",
    "as_policy",
    "check_resources",
    "dry_run",
    "feature_metrics",
    "frechet_distance",
    "load_clip",
    "load_feature_extractor",
    "load_inception",
    "load_pipeline",
    "precision_recall_density_coverage",
]

if TYPE_CHECKING:
    from .merging.coefficients import EMANet
    from .merging.pool import CheckpointPool
    from .metrics.clip import JointTextFeatures, load_clip
    from .metrics.extractors import JointFeatures, load_feature_extractor
    from .metrics.frechet import FrechetDistance, frechet_distance
    from .metrics.image_metrics import FeatureDistance
    from .metrics.inception import InceptionV3, load_inception
    from .metrics.kernel import KernelDistance
    from .metrics.prdc import precision_recall_density_coverage
    from .metrics.scores import feature_metrics
    from .metrics.statistics import FeatureStatistics
    from .models.edm2 import EDM2UNet2DModel
    from .models.sit import SiTTransformer2DModel
    from .pipelines.edm2 import EDM2Pipeline
    from .pipelines.sit import SiTPipeline
    from .policies import ClassConditionalPolicy, DiffusionPolicy, as_policy, load_pipeline
    from .rewards.subset_replace import SubsetReplaceReward
    from .trainer.base_config import DiffusionTrainerConfig
    from .trainer.callbacks import LogSamplesCallback
    from .trainer.diffusion_distribution_config import PAPER, DiffusionDistributionConfig
    from .trainer.distribution_reward_trainer import DistributionRewardTrainer
    from .trainer.dry_run import check_resources, dry_run
    from .trainer.merge_coefficient_config import MergeCoefficientConfig
    from .trainer.merge_coefficient_trainer import MergeCoefficientTrainer


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})
