# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Statistics of feature vectors, distances between sets of them, and the extractors that make them."""

from .backbones import BackboneFeatures as BackboneFeatures
from .clip import CLIPEmbeddings as CLIPEmbeddings
from .distance import Distance as Distance
from .extractors import extract_features as extract_features
from .scores import cmmd as cmmd
from .scores import frechet_infinity as frechet_infinity
from .scores import inception_score as inception_score
from .scores import kernel_inception_distance as kernel_inception_distance
