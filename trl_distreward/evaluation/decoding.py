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
# Pillow knows more, among them PostScript, for which it starts Ghostscript
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MOST_BYTES, _MOST_PIXELS = 2**28, 2**26  # of an image, which a small file can claim many more of


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
        grown = (resize or 0) ** 2 * max(image.size) // min(image.size)  # a narrow image, brought to a size
        if max(image.width * image.height, grown) > _MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels take too much memory")
        mode = _deep_mode(image) or image.mode
        image.load()
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"its format is none of {', '.join(_FORMATS)}" if unknown else error
        name, remedy = os.fsencode(stored.name).decode(errors="backslashreplace"), "repair or remove it"
        raise UnreadableImage(f"{name} cannot be decoded ({reason}): {remedy}, or pass --skip-corrupt.") from error
    if mode not in _EIGHT_BITS:
        raise UnreadableImage(f"{stored.name} has more than 8 bits per channel (mode {mode!r}): convert it to 8 bits.")
    image = image.convert("RGB")
    return np.array(image if resize is None else center_crop(image, resize)).transpose(2, 0, 1)


def read_content(content: object) -> bytes | np.ndarray:
    """Encoded bytes or pixels of a stored image; may raise any error."""
    if isinstance(content, Mapping):
        content = content["path"] if content.get("bytes") is None else content["bytes"]
    if isinstance(content, str | os.PathLike):
        path = os.fspath(content)
        path.encode()  # a name that is not UTF-8 fits no message and no report
        if "://" not in path and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is a folder that was read before, a pipe or a socket")
        with fsspec.open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    if isinstance(content, bytes):
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return content
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.shape[2:] not in ((), (1,), (3,)):
        raise ValueError("its pixels are not uint8 of shape (H, W), (H, W, 1) or (H, W, 3)")
    return content


def _open(content: object) -> Image.Image:
    if isinstance(content, Image.Image):  # of a stream that was mapped
        return content
    content = read_content(content)
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    return Image.fromarray(content[:, :, 0] if content.shape[2:] == (1,) else content)


def _deep_mode(image: Image.Image) -> str | None:
    """Stored mode of a file whose 16-bit channels Pillow silently truncates to 8 bits."""
    for _, _, _, arguments in getattr(image, "tile", []):
        raw = arguments[0] if isinstance(arguments, tuple) else arguments
        if isinstance(raw, str) and raw.endswith((";16B", ";16L", ";16N")):
            return raw
    return None


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops to `size` x `size` as ADM and EDM2 do: halves by averaging while it can, then resizes bicubically."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
