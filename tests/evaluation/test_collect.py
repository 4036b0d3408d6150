# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.images import pixels, project, write_folder
from tests.helpers import tiny_pipeline
from trl_distreward import FeatureStatistics
from trl_distreward.evaluation.collect import collect_features, read_progress
from trl_distreward.evaluation.generated import GenerationPlan, generate_shards
from trl_distreward.evaluation.sources import FolderImages, NpzImages, ShardedImages
from trl_distreward.generation import SamplingSchedule
from trl_distreward.policies import as_policy


def collect(source, folder, extractor=project, **kwargs):
    options = {"name": "project", "batch_size": 8, "progress": False, **kwargs}
    return collect_features(source, extractor, folder, **options)


class Network(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, images):
        return super().forward(images.float().mean(dim=(2, 3)))


def test_features_are_the_images_in_order(tmp_path):
    images = pixels(100)
    np.savez(tmp_path / "s.npz", images)
    collected = collect(NpzImages(tmp_path / "s.npz"), tmp_path / "work")
    expected = project(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(collected.features(), expected, rtol=1e-5, atol=1e-5)
    assert collected.count == 100 and collected.modes == {"RGB": 100} and collected.image_size == (8, 8)
    statistics, whole = collected.statistics(), FeatureStatistics.from_features(collected.features())
    torch.testing.assert_close(statistics.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_work_that_stopped_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_distreward.evaluation.sources._MAX_LANES", 4)
    np.savez(tmp_path / "s.npz", pixels(120))
    source = NpzImages(tmp_path / "s.npz")
    whole = collect(source, tmp_path / "whole", batch_size=1)
    seen = []

    def interrupted(images):
        seen.append(len(images))
        if len(seen) == 50:  # the second of four lanes: 30 images, then 16 that are counted, then 3 that are not
            raise KeyboardInterrupt
        return project(images)

    with pytest.raises(KeyboardInterrupt):
        collect(source, tmp_path / "work", interrupted, batch_size=1)
    with open(tmp_path / "work" / "lane-01.f32", "ab") as file:  # written, but not counted yet when the end came
        file.write(b"half a row")
    resumed = collect(source, tmp_path / "work", interrupted, batch_size=1)
    assert torch.equal(resumed.features(), whole.features())
    assert len(seen) == 120 + 4
    collect(source, tmp_path / "work", interrupted, batch_size=1)
    assert len(seen) == 120 + 4


def test_other_settings_are_not_mixed_into_unfinished_work(tmp_path):
    write_folder(tmp_path / "images")
    source = FolderImages(tmp_path / "images")
    collect(source, tmp_path / "work")
    with pytest.raises(ValueError, match="begun with other settings: batch_size was 8 and is 4. Give the same again"):
        collect(source, tmp_path / "work", batch_size=4)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "images" / "new.png")
    with pytest.raises(ValueError, match="images was 20 and is 21"):
        collect(FolderImages(tmp_path / "images"), tmp_path / "work")


def test_other_weights_under_the_same_name_are_not_mixed(tmp_path):
    np.savez(tmp_path / "s.npz", pixels(20))
    source = NpzImages(tmp_path / "s.npz")
    first, second = (Network() for _ in range(2))
    collected = collect(source, tmp_path / "work", first)
    with pytest.raises(ValueError, match="extractor.weights was '"):
        collect(source, tmp_path / "work", second)
    (tmp_path / "work" / "mine.txt").write_text("kept")
    collected.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine.txt"]


def test_features_are_not_taken_for_those_of_another_generator(tmp_path):
    for seed in (0, 1):
        generate_shards(
            as_policy(tiny_pipeline(seed)),
            GenerationPlan(8, SamplingSchedule(2, last_step_size=0.04), batch_size=4),
            tmp_path / f"images-{seed}",
            progress=False,
        )
    for extractor in (project, Network()):  # one without weights, and one with
        work = tmp_path / type(extractor).__name__
        collect(ShardedImages(tmp_path / "images-0"), work, extractor)
        with pytest.raises(ValueError, match="begun with other settings: images.weights was '.*' and is '"):
            collect(ShardedImages(tmp_path / "images-1"), work, extractor)


def test_images_that_were_replaced_are_noticed(tmp_path):
    write_folder(tmp_path / "images")
    np.savez(tmp_path / "s.npz", pixels(20))
    opened = {"images": FolderImages, "s.npz": NpzImages}
    for name, kind in opened.items():
        collect(kind(tmp_path / name), tmp_path / f"{name}.work")
        collect(kind(tmp_path / name), tmp_path / f"{name}.work")
    for name, changed in (("images", tmp_path / "images" / "a" / "000.png"), ("s.npz", tmp_path / "s.npz")):
        status = changed.stat()
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(ValueError, match=r"other settings: images\.files? was"):
            collect(opened[name](tmp_path / name), tmp_path / f"{name}.work")


def test_remedies_of_errors_go_on_in_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_distreward.evaluation.collect._SAVE_EVERY", 1)
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "b" / "007.png").write_bytes(b"nothing")  # the fourteenth
    source, work = FolderImages(tmp_path / "images"), tmp_path / "work"
    for wrong in ({"batch_size": 0}, {"num_workers": 0}, {"resize": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be at least 1"):
            collect(source, work, **wrong)
    assert not work.exists()
    with pytest.raises(ValueError, match="007.png cannot be decoded.*pass --skip-corrupt"):
        collect(source, work, batch_size=4)
    begun = [read_progress(work, lane).rows for lane in range(5)]
    assert begun == [4, 4, 4, 0, 0]
    collected = collect(source, work, batch_size=4, skip_corrupt=True)
    assert collected.count == 19
    with pytest.raises(ValueError, match="007.png cannot be decoded"):  # without, nothing is left out in silence
        collect(source, work, batch_size=4)
    write_folder(tmp_path / "mixed")
    Image.fromarray(pixels(1, 10, 12)[0]).save(tmp_path / "mixed" / "a" / "001.png")
    mixed = FolderImages(tmp_path / "mixed")
    with pytest.raises(ValueError, match="Pass --resize N.* or resize them yourself.$"):
        collect(mixed, tmp_path / "early")
    assert collect(mixed, tmp_path / "early", resize=6).count == 21
    with pytest.raises(ValueError, match=f"Pass --resize N.*Remove {tmp_path / 'late'} first"):
        collect(mixed, tmp_path / "late", batch_size=1)


def test_a_lane_that_lost_features_is_begun_again(tmp_path):
    write_folder(tmp_path / "images")
    source = FolderImages(tmp_path / "images")
    expected = collect(source, tmp_path / "work").features()
    lane = tmp_path / "work" / "lane-01.f32"
    for content in (lane.read_bytes()[:-4], None):
        lane.unlink() if content is None else lane.write_bytes(content)
        assert torch.equal(collect(source, tmp_path / "work").features(), expected)


def test_corrupt_images_are_named_or_left_out_and_counted(tmp_path):
    write_folder(tmp_path / "images")
    for name in ("a/000.png", "b/007.png"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    source = FolderImages(tmp_path / "images")
    with pytest.raises(ValueError, match=r"a/000.png cannot be decoded"):
        collect(source, tmp_path / "work")
    collected = collect(source, tmp_path / "skip", skip_corrupt=True)
    assert collected.count == 18 and len(collected.features()) == 18
    assert [s.split(" cannot")[0][-9:] for s in collected.skipped] == ["a/000.png", "b/007.png"]
    for path in source.names:
        (tmp_path / "images" / path).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no image that can be read"):
        collect(source, tmp_path / "none", skip_corrupt=True)


def test_mixed_sizes_need_a_resize(tmp_path):
    write_folder(tmp_path / "images")
    Image.fromarray(pixels(1, 10, 12)[0]).save(tmp_path / "images" / "b" / "odd.png")
    source = FolderImages(tmp_path / "images")
    with pytest.raises(ValueError, match=r"a/000.png is 8 x 8, .*b/odd.png is 12 x 10 pixels. Pass --resize N"):
        collect(source, tmp_path / "work")
    collected = collect(source, tmp_path / "resized", resize=6)
    assert collected.count == 21 and collected.image_size == (6, 6)


def test_features_that_are_not_finite_name_their_images(tmp_path):
    images = pixels(20)
    images[13] = 0
    np.savez(tmp_path / "s.npz", images)

    def divides(images):
        means = images.float().flatten(1).mean(1, keepdim=True)
        return torch.cat([means, means / means], dim=1)

    with pytest.raises(ValueError, match=r"'project' gave NaN or infinite values for 1 images \(.*s.npz, image 13\)"):
        collect(NpzImages(tmp_path / "s.npz"), tmp_path / "work", divides)
