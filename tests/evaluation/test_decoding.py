# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.images import pixels
from trl_distreward.evaluation.decoding import StoredImage, UnreadableImage, center_crop, decode_image


def stored(image, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return StoredImage("a/b.img", buffer.getvalue())


def rgb_of(decoded):
    return decoded[0].permute(1, 2, 0).numpy()


def test_rgb_comes_back_unchanged_and_gray_palette_and_alpha_as_pillow_converts_them():
    image = Image.fromarray(pixels(1, 6, 9)[0])
    decoded, mode = decode_image(stored(image))
    assert mode == "RGB" and decoded.dtype == torch.uint8 and decoded.shape == (3, 6, 9)
    assert np.array_equal(rgb_of((decoded,)), np.array(image))
    gray = image.convert("L")
    assert np.array_equal(rgb_of(decode_image(stored(gray))), np.array(gray)[..., None].repeat(3, axis=2))
    palette = image.quantize(7)
    assert np.array_equal(rgb_of(decode_image(stored(palette))), np.array(palette.convert("RGB")))
    clear = np.concatenate([np.array(image), np.full((6, 9, 1), 10, np.uint8)], axis=2)
    decoded, mode = decode_image(stored(Image.fromarray(clear)))  # dropped, not composited
    assert mode == "RGBA" and np.array_equal(rgb_of((decoded,)), clear[..., :3])


def test_orientation_is_ignored_as_the_reference_tools_do():
    image = Image.fromarray(pixels(1, 6, 9)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(rgb_of(decode_image(stored(image, exif=exif))), np.array(image))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(mode):
    image = Image.new("I", (4, 4), 1000).convert(mode) if mode != "I;16" else Image.new("I;16", (4, 4), 1000)
    with pytest.raises(UnreadableImage, match=r"a/b.img has pixels of mode '\w.*more than 8 bits.*convert it"):
        decode_image(stored(image, "TIFF"))


def deep_png(color, channels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(3 * channels * 2)) for _ in range(3))  # 3 x 3 pixels of 16 bits
    header = struct.pack(">IIBBBBB", 3, 3, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        deep_png(2, 3),
        deep_png(4, 2),
        deep_png(6, 4),
        b"P6 2 2 65535\n" + bytes(24),
        b"P3 1 1 1000\n 1 2 3\n",
    ],
    ids=["RGB", "LA", "RGBA", "PPM", "plain PPM"],
)
def test_more_than_8_bits_are_refused_where_pillow_would_truncate_them(content):
    assert Image.open(io.BytesIO(content)).mode in ("RGB", "RGBA")
    with pytest.raises(UnreadableImage, match=r"a/b.img has pixels of mode '\w.*more than 8 bits.*convert it"):
        decode_image(StoredImage("a/b.img", content))


def test_8_bits_and_fewer_are_not_taken_for_more():
    for kind in ("PNG", "TIFF", "PPM", "BMP"):
        assert decode_image(stored(Image.fromarray(pixels(1, 6, 9)[0]), kind))[1] == "RGB"
    assert decode_image(StoredImage("small", b"P6 2 2 15\n" + bytes(12)))[1] == "RGB"
    bitmap = (
        b"BM" + struct.pack("<IHHI", 62, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    )
    assert decode_image(StoredImage("b.bmp", bitmap + bytes(8)))[1] == "RGB"  # 5 bits each


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_named(kind):
    whole = stored(Image.fromarray(pixels(1, 64, 64)[0]), kind).content
    for content in (whole[: len(whole) // 2], whole[:9], b"", b"hello"):
        with pytest.raises(UnreadableImage, match=r"a/b.img cannot be decoded: .*--skip-corrupt"):
            decode_image(StoredImage("a/b.img", content))


def test_arrays_that_are_no_images_are_named():
    with pytest.raises(UnreadableImage, match=r"row 3 is an array \(4, 4, 3\) of float64: images must be uint8"):
        decode_image(StoredImage("row 3", np.zeros((4, 4, 3))))
    with pytest.raises(UnreadableImage, match=r"\(4, 4, 4\)"):
        decode_image(StoredImage("row 3", np.zeros((4, 4, 4), np.uint8)))


@pytest.mark.parametrize(("height", "width"), [(40, 25), (16, 16), (17, 80), (9, 30), (33, 32)])
def test_crop_is_centred_and_keeps_proportions(height, width):
    # a ramp in each direction: what is left of it tells where the crop lies and at what scale
    down, across = (np.linspace(0, 200, n) for n in (height, width))
    ramp = np.stack(np.broadcast_arrays(down[:, None], across[None, :], 100), axis=2).astype(np.uint8)
    cropped = np.array(center_crop(Image.fromarray(ramp), 8)).astype(float)
    assert cropped.shape == (8, 8, 3)
    short = min(height, width)
    for axis, size in ((0, height), (1, width)):
        values = cropped[..., axis].mean(axis=1 - axis)
        assert abs(values.mean() - 100) < 200 * 1.5 / 8  # of the centre, to within a pixel and a half of the result
        assert (values[-1] - values[0]) / 7 == pytest.approx(200 / size * short / 8, rel=0.2)


def test_halving_averages_pixels():
    image = np.zeros((16, 16, 3), np.uint8)
    image[::2] = 200
    assert (np.array(center_crop(Image.fromarray(image), 8)) == 100).all()
