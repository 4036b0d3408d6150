# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors and distances between sets of them."""

from .frechet import FrechetDistance, frechet_distance
from .report import FeatureDistance, JointFeatures, extract_features
from .statistics import FeatureStatistics

__all__ = [
    "FeatureDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "JointFeatures",
    "extract_features",
    "frechet_distance",
]
