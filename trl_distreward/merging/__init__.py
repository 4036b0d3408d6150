# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of checkpoints, and coefficients to merge them with."""

from .pool import CheckpointPool
from .posthoc import posthoc_ema_coefficients, power_profile_coefficients, sigma_rel_to_gamma

__all__ = [
    "CheckpointPool",
    "posthoc_ema_coefficients",
    "power_profile_coefficients",
    "sigma_rel_to_gamma",
]
