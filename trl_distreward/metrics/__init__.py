# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors and distances between sets of them."""

from .composite import DebiasedDistance, SumDistance
from .distances import Distance
from .frechet import FrechetDistance, frechet_distance
from .kernel import KernelDistance
from .report import FeatureDistance, JointFeatures, extract_features
from .sliced import SlicedWassersteinDistance
from .statistics import FeatureStatistics

__all__ = [
    "DebiasedDistance",
    "Distance",
    "FeatureDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "JointFeatures",
    "KernelDistance",
    "SlicedWassersteinDistance",
    "SumDistance",
    "extract_features",
    "frechet_distance",
]
