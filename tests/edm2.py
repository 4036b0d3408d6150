# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Small EDM2 networks, and a pattern of weights for them and for the original code."""

import torch
from torch import nn

from trl_distreward import EDM2Pipeline, EDM2UNet2DModel

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "num_classes": 5,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}


def tiny_edm2(seed=0, **kwargs):
    """Makes an EDM2 with random weights and gains, so that labels and noise levels matter."""
    torch.manual_seed(seed)
    model = EDM2UNet2DModel(**{**TINY, **kwargs})
    for parameter in model.parameters():
        if parameter.ndim == 0:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def tiny_edm2_pipeline(seed=0, **kwargs):
    pipeline = EDM2Pipeline(tiny_edm2(seed, **kwargs), guider=tiny_edm2(seed + 1, num_classes=0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pattern(shape, phase):
    """Makes a chirp: fixed numbers in [-1, 1] without much structure."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * numbers**2 + phase).float().view(shape)


def fill_with_pattern(model, phase=0.0):
    """Fills every tensor with a chirp, in the order of the state dict, and gains with numbers from 0.5 to 1.5."""
    for i, value in enumerate(model.state_dict().values()):
        filled = pattern(value.shape, phase + i)
        value.copy_(1 + 0.5 * filled if value.ndim == 0 else filled)
    return model
