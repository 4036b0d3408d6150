# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
One image as it is stored, to the uint8 RGB `(3, H, W)` that extractors see.

Decoded as pytorch-fid, torch-fidelity, clean-fid and ADM do, so that numbers can be compared: gray, palette and CMYK
images become RGB, an alpha channel is dropped with what is under it left as it is, the first frame of an animation is
taken, and EXIF orientation is ignored. Pixels of more than 8 bits are refused, where those tools clip or truncate
them; in JPEG 2000 and AVIF they are not noticed.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_RGB_LIKE = ("RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "La", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")
_DEEP = (";16B", ";16L", ";16N")  # Pillow's names of stored values that it truncates to 8 bits; "BGR;16" is 5-6-5 bits


class UnreadableImage(ValueError):
    """An image that is corrupt, or of a kind that cannot be read without loss."""


@dataclass(frozen=True)
class StoredImage:
    """An image's name, its content, a file's bytes or pixels `(H, W)` or `(H, W, C)`, and its prompt if it has one."""

    name: str
    content: bytes | np.ndarray
    prompt: str | None = None


def decode_image(stored: StoredImage, resize: int | None = None) -> tuple[Tensor, str]:
    """
    Args:
        stored ([`StoredImage`]): what to decode.
        resize (`int`, *optional*): crop the centre and resize it to this many pixels; see [`center_crop`].

    Returns:
        uint8 `(3, H, W)`, and the mode it was stored in, in Pillow's words.

    Raises:
        UnreadableImage: naming the image.
    """
    if isinstance(stored.content, bytes):
        image = _open(stored.name, stored.content)
    else:
        image = _from_pixels(stored.name, stored.content)
    mode = image.mode
    if mode not in _RGB_LIKE:
        raise _too_deep(stored.name, mode)
    image = image.convert("RGB")
    if resize is not None:
        image = center_crop(image, resize)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), mode


def _open(name: str, content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        deep = [raw for tile in image.tile if (raw := _deep_mode(*tile))]
        image.load()
    except Exception as error:  # decoders raise whatever they trip over
        reason = "its content is no image that Pillow knows" if content else "it is empty"
        detail = reason if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
        raise UnreadableImage(
            f"{name} cannot be decoded: {detail}. Repair or remove it, or pass --skip-corrupt to go on without it."
        ) from error
    if deep:
        raise _too_deep(name, deep[0])
    return image


def _deep_mode(codec: str, extents: object, offset: int, given: object = None) -> str | None:
    """How a tile of a file is stored, where that is in more bits than Pillow keeps."""
    raw, *rest = given if isinstance(given, tuple) else (given,)
    if codec.startswith("ppm") and isinstance(raw, str) and rest and isinstance(rest[0], int) and rest[0] > 255:
        return f"{raw}, values to {rest[0]}"
    return raw if isinstance(raw, str) and raw.endswith(_DEEP) else None


def _too_deep(name: str, mode: str) -> UnreadableImage:
    return UnreadableImage(
        f"{name} has pixels of mode {mode!r}, more than 8 bits each: convert it to 8 bits, scaling its values as you "
        "see fit."
    )


def _from_pixels(name: str, pixels: np.ndarray) -> Image.Image:
    gray = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if pixels.dtype != np.uint8 or not (gray or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise UnreadableImage(
            f"{name} is an array {pixels.shape} of {pixels.dtype}: images must be uint8 of shape (H, W, 3), (H, W, 1) "
            "or (H, W)."
        )
    return Image.fromarray(pixels.reshape(pixels.shape[:2]) if gray else pixels)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    The centre of an image in `size` x `size` pixels, as ADM and EDM2 prepare ImageNet.

    The image is halved by averaging 2 x 2 pixels while its shorter side is at least twice `size`, then brought to
    `size` at its shorter side by bicubic interpolation, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
