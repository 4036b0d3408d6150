# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Sets of images, their features, and reports of how far one is from another."""

from .collect import CollectedFeatures, collect_features
from .sources import ImageSource, open_images
from .statistics import write_statistics

__all__ = ["CollectedFeatures", "ImageSource", "collect_features", "open_images", "write_statistics"]
