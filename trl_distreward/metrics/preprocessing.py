# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Preparation of generated images for feature networks: range, colour and size."""

import torch
from torch import Tensor


def to_rgb(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uint8 or floating-point images `(B, 3 or 1, H, W)` in [0, 255] as `(B, 3, H, W)` of `dtype`; gradients pass."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(f"images have shape {tuple(images.shape)}: they must be (B, 3, H, W), or (B, 1, H, W) grey.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the feature network's weights are {dtype}: features are computed in float32 or float64.")
    if images.is_floating_point():
        largest = images.detach().max()
        # the most frequent mistake, which silently gives features of a black image
        if largest <= 1 and (images != images.round()).any():
            raise ValueError(f"float images end at {largest:.4g}: they must lie in [0, 255]; multiply by 255.")
    elif images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: they must be uint8, or floating-point numbers in [0, 255].")
    return images.to(dtype).expand(-1, 3, -1, -1)


def resize_tensorflow(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: output i is read at `i * in / out` in float32, without half-pixel centres."""
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=images.device)
        position = position * torch.tensor(length / size, dtype=torch.float32)
        low = position.long()
        fraction = (position - low).to(images.dtype)
        fraction = fraction.view(-1, 1) if dim == 2 else fraction
        first, second = (images.index_select(dim, i) for i in (low, (low + 1).clamp(max=length - 1)))
        images = first + (second - first) * fraction
    return images


def resize_pillow(images: Tensor, size: int, mode: str = "bicubic", eight_bit: bool = True) -> Tensor:
    """
    `PIL.Image.resize` to `(size, size)`, antialiased. With `eight_bit` the result equals Pillow's bit for bit: weights
    are its 22-bit fixed-point numbers, and values are rounded and clamped after each of the two passes. The gradient
    is that of the unrounded result where it is not clamped. Without `eight_bit` the image is one of mode "F".
    """
    result = images.double()
    for dim in (3, 2):
        weights = pillow_weights(images.shape[dim], size, mode)
        if eight_bit:
            weights = (weights * 2**22).round() / 2**22
        weights = weights.to(images.device)
        result = result @ weights.T if dim == 3 else weights @ result
        if eight_bit:  # sums of such products are exact in float64; ties go up
            result = result.clamp(0, 255)
            result = result + ((result + 0.5).floor() - result).detach()
        else:
            result = result.float().double()
    return result.to(images.dtype)


def pillow_weights(length: int, size: int, mode: str) -> Tensor:
    """Weights `(size, length)` of the input's pixels, float64: a filter around each output's centre, normalized."""
    scale = length / size
    width = max(scale, 1.0)
    support = {"bicubic": 2.0, "bilinear": 1.0}[mode] * width
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(length, dtype=torch.float64)
    inside = (pixel >= (centre - support + 0.5).floor()) & (pixel < (centre + support + 0.5).floor())
    # in Pillow's order of operations: the last bit decides ties, and factors like 8/7 and 4/3 have many
    x = ((pixel - centre + 0.5) * (1 / width)).abs()
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys's cubic convolution with a = -1/2
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far) * (x < 2)
    weights = weights * inside
    return weights / weights.cumsum(dim=1)[:, -1:]
