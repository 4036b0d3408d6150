# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards: callables from images to one number per image."""

from .diagnostics import reward_diagnostics
from .slots import SlotSampler, StratifiedSlotSampler
from .subset_replace import SubsetReplaceReward

__all__ = ["SlotSampler", "StratifiedSlotSampler", "SubsetReplaceReward", "reward_diagnostics"]
