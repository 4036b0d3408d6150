# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards: callables from images to one number per image."""

from .diagnostics import reward_diagnostics
from .per_image import HeadScore, PromptScore, aesthetic_score, clip_score, hps_score, load_linear_head, pick_score
from .slots import SlotSampler, StratifiedSlotSampler
from .subset_replace import SubsetReplaceReward

__all__ = [
    "HeadScore",
    "PromptScore",
    "SlotSampler",
    "StratifiedSlotSampler",
    "SubsetReplaceReward",
    "aesthetic_score",
    "clip_score",
    "hps_score",
    "load_linear_head",
    "pick_score",
    "reward_diagnostics",
]
