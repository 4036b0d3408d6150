# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sets of images, their features, and how far one set is from another."""

from .features import CollectedFeatures, collect_features
from .generated import GeneratedImages
from .real import real_data
from .sources import ImageSource, open_images

__all__ = ["CollectedFeatures", "GeneratedImages", "ImageSource", "collect_features", "open_images", "real_data"]
