# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import pattern_images
from trl_distreward.metrics.precision import full_precision
from trl_distreward.metrics.preprocessing import resize_pillow, to_rgb


def noise(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 96, 130)])
@pytest.mark.parametrize("size", [24, 56, 96, 131])
def test_pillow_resize_equals_pillow_bit_for_bit(shape, size, mode):
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    for images in (noise(*shape), pattern_images(*shape)):
        arrays = images.permute(0, 2, 3, 1).numpy()
        expected = np.stack([np.asarray(Image.fromarray(a).resize((size, size), filters[mode])) for a in arrays])
        resized = resize_pillow(images.float(), size, mode)
        assert torch.equal(resized, torch.from_numpy(expected).permute(0, 3, 1, 2).float())


def test_the_rounded_resize_has_the_gradient_of_the_unrounded_one():
    image = (64 + noise(1, 1, 9, 8).float() / 2).requires_grad_()  # its resize stays within [0, 255]
    weights = torch.linspace(-1, 1, 49).view(7, 7)
    gradients = [
        torch.autograd.grad((resize_pillow(image, 7, eight_bit=rounded) * weights).sum(), image)[0]
        for rounded in (True, False)
    ]
    assert torch.allclose(*gradients, atol=1e-5)
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize(
    ("images", "dtype", "message"),
    [
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.float32, r"shape \(2, 4, 8, 8\): they must be \(B, 3"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.float32, r"shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.float32, "torch.int64: they must be uint8"),
        (torch.full((1, 3, 8, 8), 0.5), torch.float32, "end at 0.5: they must lie in .0, 255.; multiply by 255"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.bfloat16, "torch.bfloat16: features are computed in float"),
    ],
)
def test_images_that_would_be_misread_are_refused(images, dtype, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(images, dtype)


def test_full_precision_forbids_autocast_and_tf32_and_puts_the_settings_back():
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    a = torch.linspace(0, 1, 64).view(8, 8)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError), torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision():
                assert [backend.fp32_precision for backend in backends] == ["ieee"] * 3
                assert torch.equal(a @ a, torch.autocast("cpu", enabled=False)(torch.matmul)(a, a))
                assert (a @ a).dtype == torch.float32
                raise KeyError
        assert [backend.fp32_precision for backend in backends] == ["tf32", *before[1:]]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
