# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors and distances between sets of them."""

from .clip import CLIPEmbeddings, JointTextFeatures, load_clip
from .composite import DebiasedDistance, SumDistance
from .distance import Distance
from .extractors import BackboneFeatures, JointFeatures, extract_features, load_feature_extractor
from .frechet import FrechetDistance, frechet_distance
from .image_metrics import FeatureDistance
from .inception import InceptionV3, load_inception
from .kernel import KernelDistance
from .prdc import precision_recall_density_coverage
from .scores import cmmd, feature_metrics, frechet_infinity, inception_score, kernel_inception_distance
from .sliced import SlicedWassersteinDistance
from .spread import half_sample_spread
from .statistics import FeatureStatistics
from .weights import find_weights

__all__ = [
    "BackboneFeatures",
    "CLIPEmbeddings",
    "DebiasedDistance",
    "Distance",
    "FeatureDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "JointFeatures",
    "JointTextFeatures",
    "KernelDistance",
    "SlicedWassersteinDistance",
    "SumDistance",
    "cmmd",
    "extract_features",
    "feature_metrics",
    "find_weights",
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
