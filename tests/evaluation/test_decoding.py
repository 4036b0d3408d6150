# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.images import encoded, pixels
from trl_distreward.evaluation.decoding import StoredImage, UnreadableImage, center_crop, decode_image


def decode(content):
    """Pixels `(H, W, 3)`."""
    return decode_image(StoredImage("a/b.img", content)).transpose(1, 2, 0)


def test_images_of_all_modes_become_rgb():
    image = Image.fromarray(pixels(1, 6, 9)[0])
    assert np.array_equal(decode(encoded(image)), np.array(image))
    assert np.array_equal(decode({"bytes": encoded(image), "path": None}), np.array(image))
    gray, palette = image.convert("L"), image.quantize(7)
    assert np.array_equal(decode(encoded(gray)), np.array(gray)[..., None].repeat(3, axis=2))
    assert np.array_equal(decode(encoded(palette)), np.array(palette.convert("RGB")))
    transparent = np.concatenate([np.array(image), np.full((6, 9, 1), 10, np.uint8)], axis=2)
    assert np.array_equal(decode(encoded(transparent)), transparent[..., :3])  # dropped, not blended


def test_orientation_is_ignored_as_the_reference_tools_do():
    image = Image.fromarray(pixels(1, 6, 9)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decode(encoded(image, exif=exif)), np.array(image))


def deep_png(color, channels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(3 * channels * 2)) for _ in range(3))  # 3 x 3 pixels of 16 bits
    header = struct.pack(">IIBBBBB", 3, 3, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = {
    **{mode: encoded(Image.new("I", (4, 4), 1000).convert(mode), "TIFF") for mode in ("I", "F")},
    "I;16": encoded(Image.new("I;16", (4, 4), 1000), "TIFF"),
    # Pillow would truncate these to 8 bits
    "RGB": deep_png(2, 3),
    "LA": deep_png(4, 2),
    "RGBA": deep_png(6, 4),
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_more_than_8_bits_are_refused(content):
    with pytest.raises(UnreadableImage, match=r"a/b.img has more than 8 bits per channel \(mode '\w.*convert it"):
        decode(content)


def test_8_bits_and_fewer_are_not_mistaken_for_more():
    for kind in ("PNG", "TIFF", "PPM", "BMP"):
        assert decode(encoded(pixels(1, 6, 9)[0], kind)).shape == (6, 9, 3)
    assert decode(b"P6 2 2 15\n" + bytes(12)).shape == (2, 2, 3)
    bitmap = (
        b"BM" + struct.pack("<IHHI", 62, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    )
    assert decode(bitmap + bytes(8)).shape == (2, 2, 3)  # 5 bits each


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "SGI"])
def test_formats_that_are_not_meant_are_refused_whatever_their_name(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encoded(pixels(1, 16, 16)[0], kind))  # Pillow runs Ghostscript for the first
    with pytest.raises(UnreadableImage, match="its format is none of JPEG, PNG"):
        decode(str(tmp_path / "a.png"))


def test_small_files_that_claim_gigabytes_are_refused(tmp_path):
    wide = encoded(np.zeros((1, 50_000, 3), np.uint8))
    large = encoded(Image.new("1", (9000, 9000)))
    sparse = tmp_path / "a.png"
    with sparse.open("wb") as file:
        file.truncate(10 * 2**30)
    for content, resize, message in (
        (large, None, "9000 x 9000 pixels take too much memory"),
        (wide, 256, "50000 x 1 pixels take too much memory"),
        (str(sparse), None, "more than 268435456 bytes"),
    ):
        with pytest.raises(UnreadableImage, match=message):
            decode_image(StoredImage("a.png", content), resize)
    assert decode(wide).shape == (1, 50_000, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_named(kind):
    whole = encoded(pixels(1, 64, 64)[0], kind)
    for content in (whole[: len(whole) // 2], whole[:9], b"", b"hello", "none.png", {"path": "none.png"}):
        with pytest.raises(UnreadableImage, match=r"a/b.img cannot be decoded .*--skip-corrupt"):
            decode(content)


def test_arrays_are_images_if_they_are_uint8():
    image = pixels(1, 4, 4)[0]
    assert np.array_equal(decode(image), image)
    assert np.array_equal(decode(image[..., :1]), image[..., :1].repeat(3, axis=2))
    for odd in (image / 255, image.astype(int), pixels(1, 4, 4, 4)[0], image.tolist(), None):
        with pytest.raises(UnreadableImage, match=r"a/b.img cannot be decoded \(its pixels are not uint8 of shape"):
            decode(odd)


@pytest.mark.parametrize(("height", "width"), [(40, 25), (16, 16), (17, 80), (9, 30), (33, 32)])
def test_crop_is_centred_and_keeps_proportions(height, width):
    # ramps in both directions: what is left of them shows where the crop lies, and at what scale
    down, across = (np.linspace(0, 200, n) for n in (height, width))
    ramp = np.stack(np.broadcast_arrays(down[:, None], across[None, :], 100), axis=2).astype(np.uint8)
    cropped = np.array(center_crop(Image.fromarray(ramp), 8)).astype(float)
    assert cropped.shape == (8, 8, 3)
    short = min(height, width)
    for axis, size in ((0, height), (1, width)):
        values = cropped[..., axis].mean(axis=1 - axis)
        assert abs(values.mean() - 100) < 200 * 1.5 / 8  # a pixel and a half of the result
        assert (values[-1] - values[0]) / 7 == pytest.approx(200 / size * short / 8, rel=0.2)
