# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Rewards: callables from images to one number per image."""

from .per_image import PromptScore as PromptScore
from .per_image import clip_score as clip_score
from .per_image import hps_score as hps_score
from .per_image import pick_score as pick_score
from .slots import SlotSampler as SlotSampler
from .slots import StratifiedSlotSampler as StratifiedSlotSampler
from .subset_replace import SubsetReplaceReward as SubsetReplaceReward
