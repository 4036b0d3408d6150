# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Real data in any form."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from huggingface_hub import constants

from tests.evaluation.images import encoded, pixels, project, project_pixels, write_folder
from tests.runs import launch
from trl_distreward import FeatureDistance, FeatureStatistics, JointFeatures, SubsetReplaceReward
from trl_distreward.evaluation import open_images, real_data
from trl_distreward.evaluation.real import build_distance


def dataset_of(images, **columns):
    held = Features({"label": Value("int64"), "caption": Value("string"), "picture": ImageColumn()})
    rows = {"label": [0] * len(images), "caption": ["a"] * len(images)} | columns
    return Dataset.from_dict({**rows, "picture": [{"bytes": encoded(image)} for image in images]}, held)


class Counted:
    """An extractor that counts the images it is given."""

    def __init__(self, scale=1.0):
        self.scale, self.seen = scale, 0

    def __call__(self, images):
        self.seen += len(images)
        return self.scale * project(images)


def expected_distance(features, distance, generated):
    return SubsetReplaceReward(project, features, distance).distances["features"].fit(generated).value


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_all_forms_of_the_same_real_data_give_the_same_distance(tmp_path, distance):
    images = write_folder(tmp_path / "folder", 30)
    np.savez(tmp_path / "sample.npz", images)
    rows = project_pixels(images)
    statistics = FeatureStatistics.from_features(rows)
    statistics.save(tmp_path / "real.safetensors", rows)
    dataset = dataset_of(images)
    dataset.save_to_disk(tmp_path / "saved")
    sources = [rows, rows.numpy(), tmp_path / "real.safetensors", str(tmp_path / "folder"), tmp_path / "sample.npz"]
    sources += [dataset, dataset.with_format("torch"), dataset.to_iterable_dataset(), tmp_path / "saved"]
    sources += [open_images(tmp_path / "folder")] + ([statistics] if distance == "frechet" else [])
    generated = torch.randn(40, 5)
    expected = expected_distance(rows, distance, generated)
    for source in sources:
        reward, metric = (kind(project, source, distance) for kind in (SubsetReplaceReward, FeatureDistance))
        for found in (reward.distances["features"], metric.distance):
            assert found.fit(generated).value == pytest.approx(expected, rel=1e-5), source
    assert FeatureStatistics.from_features(rows.numpy()).count == 30


def test_images_of_a_folder_are_brought_to_a_size_when_asked(tmp_path):
    write_folder(tmp_path / "folder", 9, height=16, width=12)
    small = SubsetReplaceReward(project, tmp_path / "folder", "kernel", real_resize=4)
    assert not torch.equal(
        real_data(tmp_path / "folder", project, features=True, resize=4),
        real_data(tmp_path / "folder", project, features=True),
    )
    sizes = [build_distance("frechet", tmp_path / "folder", project, side).image_size for side in (4, None)]
    assert sizes == ["4x4", "16x12"]
    metric = FeatureDistance(project, tmp_path / "folder", "kernel", real_resize=4)
    generated = torch.randn(9, 5)
    assert metric.distance.fit(generated).value == small.distances["features"].fit(generated).value


def test_statistics_of_a_folder_are_kept_until_anything_changes(tmp_path):
    folder = tmp_path / "folder"
    write_folder(folder, 9)

    def computed(scale=1.0, **options):
        """Images that the extractor saw, beyond the one that tells it from others."""
        extractor = Counted(scale)
        real_data(folder, extractor, **{"features": False, **options})
        assert not list(Path(constants.HF_HOME, "trl_distreward").glob("*.work"))
        return extractor.seen - 1

    assert [computed(), computed(), computed(features=True), computed(features=True)] == [9, 0, 9, 0]
    assert [computed(scale=2.0), computed(scale=2.0), computed(resize=4), computed(resize=4)] == [9, 0, 9, 0]
    first, second = sorted(folder.rglob("*.png"))[:2]
    content, times = second.read_bytes(), os.stat(second)
    second.write_bytes(encoded(255 - pixels(9)[2]).ljust(len(content), b"\0"))
    assert os.stat(second).st_size == times.st_size  # with the same time too, as an archive leaves it
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [computed(), computed()] == [9, 0]
    second.write_bytes(content)
    assert computed() == 0  # as it was at first
    folder = folder.rename(tmp_path / "moved")
    assert computed() == 0
    first, second = sorted(folder.rglob("*.png"))[:2]
    second.rename(second.with_name("zzz.png"))
    assert [computed(), computed()] == [9, 0]
    first.unlink()
    assert [computed(), computed()] == [8, 0]


def test_statistics_of_datasets_are_kept_but_for_streams(tmp_path):
    images = write_folder(tmp_path / "folder", 9)
    dataset = dataset_of(images)
    paths = Dataset.from_dict({"picture": sorted(map(str, (tmp_path / "folder").rglob("*.png")))})
    paths = paths.cast_column("picture", ImageColumn())
    for source, kept in ((dataset, True), (paths, True), (dataset.to_iterable_dataset(), False)):
        extractor = Counted()
        first = real_data(source, extractor, features=True)
        seen, again = extractor.seen, real_data(source, extractor, features=True)
        assert torch.equal(first, again)
        assert (extractor.seen - seen == 1) == kept
    assert len(list(Path(constants.HF_HOME, "trl_distreward").iterdir())) == 1


def test_extractors_that_need_conditions_find_them_in_a_dataset():
    images, labels = pixels(9), [0, 1, 2] * 3
    joint = JointFeatures(project, num_classes=3, scale=1)
    expected = joint(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels))
    torch.testing.assert_close(real_data(dataset_of(images, label=labels), joint, features=True), expected)

    def lengths(images, prompts):
        return torch.cat([project(images), torch.tensor([[float(len(prompt))] for prompt in prompts])], dim=1)

    lengths.needs_conditions = True
    captions = ["a" * (i + 1) for i in range(9)]
    found = real_data(dataset_of(images, caption=captions), lengths, features=True)
    assert found[:, -1].tolist() == [float(i + 1) for i in range(9)]


def test_what_holds_no_real_data_is_refused_with_what_to_pass(tmp_path):
    FeatureStatistics.from_features(torch.randn(9, 5)).save(tmp_path / "moments.safetensors")
    (tmp_path / "empty").mkdir()
    picture = dataset_of(pixels(2))
    for source, message in (
        (
            torch.zeros(7, 3, 8, 8, dtype=torch.uint8),
            r"shape \(7, 3, 8, 8\) are images: pass their features",
        ),
        (np.zeros((7, 3, 8, 8)), r"\(7, 3, 8, 8\) are images"),
        (tmp_path / "lost", "no file or folder .*lost: give statistics"),
        ("my-org/images", "or a dataset that load_dataset returned"),
        (tmp_path / "empty", "holds no images"),
        (picture.select([]), "the dataset is empty"),
        (picture.select_columns(["label"]), "the columns label, of which none hold images"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            SubsetReplaceReward(project, source)
    with pytest.raises(ValueError, match="holds no features"):
        SubsetReplaceReward(project, tmp_path / "moments.safetensors", "kernel")
    with pytest.raises(ValueError, match="has dimension 5, but the images are seen with 6"):
        SubsetReplaceReward(Named(), tmp_path / "moments.safetensors")


class Named(partial):
    name, dimension = "mine", 6

    def __new__(cls):
        return super().__new__(cls, project)


def test_out_of_memory_in_the_features_names_the_option_to_lower(tmp_path):
    write_folder(tmp_path, 9)

    def full(images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return project(images)

    with pytest.raises(torch.OutOfMemoryError, match="features run out of memory: lower --batch-size, 64"):
        SubsetReplaceReward(full, tmp_path)


PROCESS = """
import sys
import torch
import torch.distributed
from tests.evaluation.images import project
from trl_distreward.evaluation import real_data

found = [real_data(sys.argv[1], project, features=True) for _ in range(2)]
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
torch.save(found, f"{sys.argv[2]}-{rank}.pt")
"""


def test_processes_share_the_work_and_have_the_same_data(tmp_path):
    images = write_folder(tmp_path / "folder", 300)
    (tmp_path / "read.py").write_text(PROCESS)
    done = launch(
        tmp_path / "read.py", tmp_path / "folder", tmp_path / "found", HF_HOME=str(tmp_path), ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for rows in torch.load(tmp_path / f"found-{rank}.pt"):
            torch.testing.assert_close(rows, project_pixels(images))
    (kept,) = (tmp_path / "trl_distreward").iterdir()
    assert kept.suffix == ".safetensors"
