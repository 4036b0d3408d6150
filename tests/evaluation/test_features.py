# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import os

import numpy as np
import pytest
import torch

from tests.evaluation.images import encoded, pixels, project, project_pixels, write_folder
from trl_distreward import FeatureStatistics
from trl_distreward.evaluation.features import collect_features
from trl_distreward.evaluation.sources import open_images


def collect(source, folder, extractor=project, **kwargs):
    return collect_features(source, {"f": extractor}, folder, **{"batch_size": 8, "num_workers": 0, **kwargs})


def sample(path, images):
    np.savez(path, images)
    return open_images(path)


class Network(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, images):
        return super().forward(images.float().mean(dim=(2, 3)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_in_the_order_of_the_images(tmp_path, num_workers):
    images = write_folder(tmp_path / "images", 100)
    collected = collect(open_images(tmp_path / "images"), tmp_path / "work", num_workers=num_workers)
    torch.testing.assert_close(collected.features("f"), project_pixels(images), rtol=1e-5, atol=1e-5)
    statistics, whole = collected.statistics("f"), FeatureStatistics.from_features(collected.features("f"))
    torch.testing.assert_close(statistics.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_interrupted_work_continues_and_ends_the_same(tmp_path):
    source = sample(tmp_path / "s.npz", pixels(200))
    whole = collect(source, tmp_path / "whole", batch_size=1)
    assert len(whole.paths) == 50  # of 4 images each
    seen = []

    def interrupted(images):
        seen.append(len(images))
        if len(seen) == 50:  # in the thirteenth shard
            raise KeyboardInterrupt
        return project(images)

    with pytest.raises(KeyboardInterrupt):
        collect(source, tmp_path / "work", interrupted, batch_size=1)
    resumed = collect(source, tmp_path / "work", interrupted, batch_size=1)
    assert len(seen) == 200 + 2 and torch.equal(resumed.features("f"), whole.features("f"))
    collect(source, tmp_path / "work", interrupted, batch_size=1)
    assert len(seen) == 200 + 2


def test_work_of_other_settings_is_not_continued(tmp_path):
    images, work = tmp_path / "images", tmp_path / "work"
    write_folder(images)
    collect(open_images(images), work, Network())
    for options, message in (
        ({"batch_size": 4}, "work of other settings: .*batch_size was 8 and is 4"),
        ({"extractor": Network()}, "extractors was"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(open_images(images), work, **options)
    os.utime(images / "a" / "000.png", (0, 4e9))
    with pytest.raises(ValueError, match="images was"):
        collect(open_images(images), work)


def test_unreadable_images_are_named_or_left_out(tmp_path):
    write_folder(tmp_path / "images")
    for name in ("a/000.png", "b/007.png"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    source = open_images(tmp_path / "images")
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"^\S*a/000.png cannot be decoded .*pass --skip-corrupt"):
            collect(source, tmp_path / "work", num_workers=num_workers)
    collected = collect(source, tmp_path / "work", skip_corrupt=True)  # the same folder
    assert len(collected.features("f")) == 18
    assert [message.split(" cannot")[0][-9:] for message in collected.skipped] == ["a/000.png", "b/007.png"]
    with pytest.raises(ValueError, match="000.png cannot be decoded"):  # nothing is left out unasked
        collect(source, tmp_path / "work")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 20 images can be read: .*000.png"):
        collect(source, tmp_path / "none", skip_corrupt=True)


def test_images_of_several_sizes_need_a_resize(tmp_path):
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "b" / "odd.png").write_bytes(encoded(pixels(1, 10, 12)[0]))
    source = open_images(tmp_path / "images")
    with pytest.raises(ValueError, match=r"b/odd.png has the shape \(3, 10, 12\), others have \(3, 8, 8\): pass --re"):
        collect(source, tmp_path / "work")
    assert len(collect(source, tmp_path / "resized", resize=6).features("f")) == 21
