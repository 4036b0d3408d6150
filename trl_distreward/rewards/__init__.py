# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards: callables from images to one number per image."""

from .per_image import HeadScore, PromptScore, clip_score, hps_score, pick_score
from .slots import SlotSampler, StratifiedSlotSampler
from .subset_replace import SubsetReplaceReward

__all__ = [
    "HeadScore",
    "PromptScore",
    "SlotSampler",
    "StratifiedSlotSampler",
    "SubsetReplaceReward",
    "clip_score",
    "hps_score",
    "pick_score",
]
