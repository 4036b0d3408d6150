# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors, distances between sets of them, and the extractors that make them."""

from .backbones import BackboneFeatures
from .clip import CLIPEmbeddings
from .distance import Distance
from .extractors import extract_features
from .scores import cmmd, frechet_infinity, inception_score, kernel_inception_distance

__all__ = [
    "BackboneFeatures",
    "CLIPEmbeddings",
    "Distance",
    "cmmd",
    "extract_features",
    "frechet_infinity",
    "inception_score",
    "kernel_inception_distance",
]
