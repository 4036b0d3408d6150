# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Original checkpoints as diffusers models and pipelines, without executing anything they carry."""

from .diffusers_dit import to_diffusers_dit, to_diffusers_pipeline
from .edm2 import OriginalEDM2, load_original_edm2, read_original_edm2
from .sit import load_original_sit

__all__ = [
    "OriginalEDM2",
    "load_original_edm2",
    "load_original_sit",
    "read_original_edm2",
    "to_diffusers_dit",
    "to_diffusers_pipeline",
]
