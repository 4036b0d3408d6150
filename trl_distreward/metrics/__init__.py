# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors, distances between sets of them, and the extractors that make them."""

from .backbones import BackboneFeatures
from .clip import CLIPEmbeddings, JointTextFeatures, load_clip
from .distance import Distance
from .extractors import JointFeatures, extract_features, load_feature_extractor
from .frechet import FrechetDistance, frechet_distance
from .image_metrics import FeatureDistance
from .inception import InceptionV3, load_inception
from .kernel import KernelDistance
from .prdc import precision_recall_density_coverage
from .scores import (
    cmmd,
    feature_metrics,
    frechet_infinity,
    half_sample_spread,
    inception_score,
    kernel_inception_distance,
)
from .statistics import FeatureStatistics

__all__ = [
    "BackboneFeatures",
    "CLIPEmbeddings",
    "Distance",
    "FeatureDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "JointFeatures",
    "JointTextFeatures",
    "KernelDistance",
    "cmmd",
    "extract_features",
    "feature_metrics",
    "frechet_distance",
    "frechet_infinity",
    "half_sample_spread",
    "inception_score",
    "kernel_inception_distance",
    "load_clip",
    "load_feature_extractor",
    "load_inception",
    "precision_recall_density_coverage",
]
