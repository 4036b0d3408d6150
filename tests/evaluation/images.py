# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images on disk and feature extractors for tests."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def pixels(count, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def encoded(image, kind="PNG", **kwargs):
    """Bytes of an image file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def write_folder(folder, count=20, **kwargs):
    """Writes PNG images into two subfolders; returns them in the order of their paths."""
    images = pixels(count, **kwargs)
    for i, image in enumerate(images):
        path = Path(folder, "ab"[i % 2], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return np.concatenate([images[::2], images[1::2]])


def project(images):
    """Five fixed random features of images of any size."""
    generator = torch.Generator().manual_seed(3)
    small = torch.nn.functional.interpolate(images.float() / 255, size=(4, 4), mode="area")
    return small.flatten(1) @ torch.randn(48, 5, generator=generator)


def squared(images):
    return project(images) ** 2


def project_pixels(images):
    """Features `project` of images `(N, H, W, 3)`."""
    return project(torch.from_numpy(images).permute(0, 3, 1, 2))


def project_or_die(images):
    """Features `project`; batch number $DIES_IN kills the process, as `kill -9` does."""
    batches.append(len(images))
    if len(batches) == int(os.environ.get("DIES_IN", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return project(images)


batches: list[int] = []
