# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Decode one stored image to uint8 RGB, as pytorch-fid, torch-fidelity, clean-fid and ADM do: an alpha channel is dropped
without blending, the first frame of an animation is taken, and EXIF orientation is ignored. Pixels of more than 8
bits, which those tools clip or truncate, are refused.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from PIL import Image

_EIGHT_BITS = ("RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "La", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")


class UnreadableImage(ValueError):
    """An image that is damaged, or that cannot be decoded without loss."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a set."""

    name: str  # for messages
    content: Any  # path, encoded bytes, uint8 pixels (H, W) or (H, W, C), or a {"bytes", "path"} cell of a dataset
    prompt: str | None = None


def decode_image(stored: StoredImage, resize: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 pixels `(3, H, W)`, after [`center_crop`] to `resize`; may raise `UnreadableImage`."""
    try:
        image = _open(stored.content)
        mode = _deep_mode(image) or image.mode
        image.load()
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        remedy = "repair or remove it, or pass --skip-corrupt"
        raise UnreadableImage(f"{stored.name} cannot be decoded ({reason}): {remedy}.") from error
    if mode not in _EIGHT_BITS:
        raise UnreadableImage(f"{stored.name} has more than 8 bits per channel (mode {mode!r}): convert it to 8 bits.")
    image = image.convert("RGB")
    return np.array(image if resize is None else center_crop(image, resize)).transpose(2, 0, 1)


def _open(content: object) -> Image.Image:
    if isinstance(content, Mapping):
        content = content["path"] if content.get("bytes") is None else content["bytes"]
    if isinstance(content, str | os.PathLike):
        with fsspec.open(os.fspath(content), "rb") as file:
            content = file.read()
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content))
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.shape[2:] not in ((), (1,), (3,)):
        raise ValueError("its pixels are not uint8 of shape (H, W), (H, W, 1) or (H, W, 3)")
    return Image.fromarray(content[:, :, 0] if content.shape[2:] == (1,) else content)


def _deep_mode(image: Image.Image) -> str | None:
    """Stored mode of a file whose 16-bit channels Pillow silently truncates to 8 bits."""
    for _, _, _, arguments in getattr(image, "tile", []):
        raw = arguments[0] if isinstance(arguments, tuple) else arguments
        if isinstance(raw, str) and raw.endswith((";16B", ";16L", ";16N")):
            return raw
    return None


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    Crops the centre to `size` x `size` pixels, as ADM and EDM2 prepare ImageNet: averages 2 x 2 pixels while the
    shorter side is at least twice `size`, then resizes it to `size` by bicubic interpolation.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
