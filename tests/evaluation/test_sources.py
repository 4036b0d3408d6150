# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value

from tests.evaluation.images import encoded, pixels, project, project_pixels, write_folder
from trl_distreward.evaluation.decoding import UnreadableImage, decode_image
from trl_distreward.evaluation.features import collect_features
from trl_distreward.evaluation.sources import StreamedImages, open_images


def contents(source, batch_size=4):
    """All images of a source, `(N, H, W, 3)`."""
    shards = [list(source.shard(i, batch_size)) for i in range(source.num_shards(batch_size))]
    return np.stack([decode_image(image).transpose(1, 2, 0) for shard in shards for image in shard])


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    images = write_folder(tmp_path, 7)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    for hidden in (".cache/x.png", "a/._000.png"):
        (tmp_path / hidden).write_bytes(b"hidden")
    source = open_images(tmp_path)
    assert source.count == 7
    assert np.array_equal(contents(source), images)


def test_links_to_folders_are_followed(tmp_path):
    write_folder(tmp_path / "images", 7)
    write_folder(tmp_path / "other", 3)
    (tmp_path / "images" / "a" / "other").symlink_to(tmp_path / "other")
    assert open_images(tmp_path / "images").count == 10


def test_strange_entries_of_a_folder_are_named_or_skipped_and_counted(tmp_path):
    folder = tmp_path / "images"
    images = write_folder(folder, 7)
    (folder / "lost.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.png"))
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")  # would count the images of b twice
    (folder / "itself.png").symlink_to("itself.png")
    with open(os.fsencode(folder) + b"/na\xefve.png", "wb") as file:
        file.write(encoded(images[0]))
    with pytest.raises(UnreadableImage, match=f"{folder}/.* cannot be decoded .*--skip-corrupt"):
        collect_features(open_images(folder), {"f": project}, tmp_path / "work")
    collected = collect_features(open_images(folder), {"f": project}, tmp_path / "other", skip_corrupt=True)
    assert torch.allclose(collected.features("f"), project_pixels(images), atol=1e-4)
    names = ["a/loop", "c", "itself.png", "lost.png", "na\\xefve.png", "pipe.png", "socket.png"]
    assert [message.partition(" ")[0] for message in collected.skipped] == [f"{folder}/{name}" for name in names]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_folder(tmp_path, 7)
    listed = Path.iterdir

    def refused(folder):
        if folder.name == "b":
            raise PermissionError(f"Permission denied: {folder}")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(PermissionError, match="/b"):
        open_images(tmp_path)


def test_npz_is_mapped_into_memory(tmp_path):
    images = pixels(11)
    np.savez(tmp_path / "sample.npz", images, np.arange(11))
    source = open_images(tmp_path / "sample.npz")
    assert np.array_equal(contents(source), images)
    for i in (3, 4, 9, 0, 10):
        assert np.array_equal(source.read(i).content, images[i])


def test_shards_hold_every_image_once_in_whole_batches(tmp_path):
    np.savez(tmp_path / "s.npz", pixels(650, 2, 2))
    source = open_images(tmp_path / "s.npz")
    for batch_size in (1, 3, 64, 1000):
        shards = [list(source.shard(i, batch_size)) for i in range(source.num_shards(batch_size))]
        assert len(shards) <= 64 and sum(map(len, shards)) == 650 and all(shards)
        assert all(len(shard) % batch_size == 0 for shard in shards[:-1])


def image_dataset(images):
    features = Features({"label": Value("int64"), "picture": Image()})
    return Dataset.from_dict(
        {"label": range(len(images)), "picture": [{"bytes": encoded(i)} for i in images]}, features
    )


def test_datasets_on_disk_and_streamed_give_the_same_images(tmp_path):
    images = pixels(12)
    dataset = image_dataset(images)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    saved = open_images(tmp_path / "saved")
    assert saved.description["columns"] == ["picture"]
    assert np.array_equal(contents(saved), images)
    for i in range(3):
        dataset.shard(3, i, contiguous=True).to_parquet(tmp_path / f"part-{i}.parquet")
    files = [str(tmp_path / f"part-{i}.parquet") for i in range(3)]
    streamed = open_images("parquet", data_files=files, streaming=True, split="train", image_column="picture")
    assert isinstance(streamed, StreamedImages) and streamed.num_shards(4) == 3
    assert np.array_equal(contents(streamed), images)


@pytest.mark.parametrize("stream", [False, True])
def test_mapped_images_are_those_that_were_made_whatever_the_format(stream):
    images = pixels(6)

    def turned(row):
        return {"picture": row["picture"].rotate(180)}

    for change, expected in ((turned, images[:, ::-1, ::-1]), (lambda row: {"label": 1}, images)):
        dataset = image_dataset(images)
        rows = dataset.to_iterable_dataset(num_shards=2) if stream else dataset
        rows = rows.map(change, features=dataset.features)
        for kind in (None, "torch", "pandas"):
            assert np.array_equal(contents(open_images(rows.with_format(kind))), expected)


def test_images_that_would_not_be_the_shown_ones_are_refused():
    dataset = image_dataset(pixels(2))
    with pytest.raises(ValueError, match="does not say its columns: pass map the features"):
        open_images(dataset.to_iterable_dataset().map(lambda row: {"label": 1}))
    with pytest.raises(ValueError, match="has a transform, and images are read as stored: use map"):
        open_images(dataset.with_transform(lambda rows: {"picture": [each.rotate(90) for each in rows["picture"]]}))


def test_split_is_needed_if_there_are_several(tmp_path):
    DatasetDict({name: image_dataset(pixels(2)) for name in ("train", "test")}).save_to_disk(tmp_path)
    assert open_images(tmp_path, split="test").count == 2
    for split in (None, "valid"):
        with pytest.raises(ValueError, match="choose one of train, test"):
            open_images(tmp_path, split=split)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"holds \['mu'\], and a sample its images as 'arr_0'"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"\(2, 4, 4, 3\) of float64"),
        ({"arr_0": np.zeros((2, 48), np.uint8)}, r"\(N, H, W, 3\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"\(0, 4, 4, 3\)"),
    ],
)
def test_only_samples_of_images_are_opened(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "s.npz")
    np.savez_compressed(tmp_path / "small.npz", pixels(5))
    with pytest.raises(ValueError, match="small.npz is no sample of images: it is compressed or damaged"):
        open_images(tmp_path / "small.npz")


def test_only_folders_of_images_are_opened(tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "step-0.png").touch()
    (tmp_path / "run" / "checkpoint-1").mkdir()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("empty", "holds no images .*.jpg"),
        ("run", "run is the output folder of a run: name a pipeline in it"),
        ("none", "[Nn]o (folder|such file)"),
        ("none.npz", "[Nn]o (folder|such file)"),
        ("run/samples/step-0.png", "[Nn]o (folder|such file)"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        ("label", {}, "has the columns label, of which none hold images"),
        (None, {"image_column": "photo"}, "of which picture hold images: name one"),
        (None, {"prompt_column": "caption"}, "of which picture hold images: name one"),
    ],
)
def test_column_of_images_is_found_or_named(tmp_path, column, options, message):
    dataset = image_dataset(pixels(2))
    (dataset.select_columns([column]) if column else dataset).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path, **options)
