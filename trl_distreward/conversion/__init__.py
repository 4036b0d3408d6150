# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Load original SiT and EDM2 checkpoints without executing anything in them."""

from .edm2 import OriginalEDM2, load_original_edm2, read_original_edm2
from .sit import load_original_sit

__all__ = ["OriginalEDM2", "load_original_edm2", "load_original_sit", "read_original_edm2"]
