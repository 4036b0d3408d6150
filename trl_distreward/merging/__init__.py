# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of checkpoints, and coefficients to merge them with."""

from .pool import CheckpointPool as CheckpointPool
from .posthoc import posthoc_ema_coefficients as posthoc_ema_coefficients
from .posthoc import power_profile_coefficients as power_profile_coefficients
from .posthoc import sigma_rel_to_gamma as sigma_rel_to_gamma
