# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Merging: pools of checkpoints, and coefficients to merge them with."""

from .pool import CheckpointPool
from .posthoc import gamma_to_sigma_rel, posthoc_ema_coefficients, power_profile_coefficients, sigma_rel_to_gamma
from .sources import PoolMember

__all__ = [
    "CheckpointPool",
    "PoolMember",
    "gamma_to_sigma_rel",
    "posthoc_ema_coefficients",
    "power_profile_coefficients",
    "sigma_rel_to_gamma",
]
