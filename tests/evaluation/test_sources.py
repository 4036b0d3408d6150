# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from tests.evaluation.images import pixels, write_folder
from trl_distreward.evaluation.datasets import DatasetImages, StreamedImages, open_dataset, stored_image
from trl_distreward.evaluation.decoding import UnreadableImage, decode_image
from trl_distreward.evaluation.files import save_sample_npz
from trl_distreward.evaluation.sources import FolderImages, NpzImages, chain_lanes, open_images


def contents(source, batch_size=4):
    return np.stack([decode_image(read())[0].permute(1, 2, 0).numpy() for read in chain_lanes(source, batch_size)])


def png(image):
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    images = write_folder(tmp_path, 7)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(b"hidden")
    source = open_images(tmp_path)
    assert isinstance(source, FolderImages) and len(source) == 7
    assert source.names == sorted(source.names)
    assert np.array_equal(contents(source), np.concatenate([images[::2], images[1::2]]))


def test_links_between_folders_are_followed_once(tmp_path):
    images = write_folder(tmp_path / "images", 7)
    write_folder(tmp_path / "other", 3)
    (tmp_path / "images" / "a" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "images" / "itself").symlink_to(tmp_path / "images")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "images" / "a")
    assert len(open_images(tmp_path / "images")) == len(images) + 3
    (tmp_path / "images" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="lost.png is a link to a file that is not there"):
        open_images(tmp_path / "images")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_a_stream_forwards_and_backwards(tmp_path, save):
    images = pixels(11)
    save(tmp_path / "sample.npz", images, np.arange(11))
    source = open_images(tmp_path / "sample.npz")
    assert isinstance(source, NpzImages)
    assert np.array_equal(contents(source), images)
    for i in (3, 4, 9, 0, 10):
        assert np.array_equal(source.read(i).content, images[i])


def test_written_samples_are_numpys(tmp_path):
    images = pixels(9)
    save_sample_npz(tmp_path / "s.npz", iter([images[:4], images[4:]]), images.shape, np.arange(9))
    with np.load(tmp_path / "s.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], images) and np.array_equal(loaded["arr_1"], np.arange(9))
    assert np.array_equal(contents(open_images(tmp_path / "s.npz")), images)


def test_lanes_hold_every_image_once_in_whole_batches(tmp_path):
    np.savez(tmp_path / "s.npz", pixels(650, 2, 2))
    source = NpzImages(tmp_path / "s.npz")
    for batch_size in (1, 3, 64, 1000):
        lanes = [list(source.lane(i, batch_size)) for i in range(source.num_lanes(batch_size))]
        assert len(lanes) <= 64 and sum(map(len, lanes)) == 650 and all(lanes)
        assert all(len(lane) % batch_size == 0 for lane in lanes[:-1])
        assert len(list(source.lane(0, batch_size, skip=len(lanes[0]) - 1))) == 1


def image_dataset(images):
    features = Features({"label": Value("int64"), "picture": Image()})
    return Dataset.from_dict({"label": range(len(images)), "picture": [{"bytes": png(i)} for i in images]}, features)


def test_datasets_on_disk_and_streamed_give_the_same_images(tmp_path):
    images = pixels(12)
    dataset = image_dataset(images)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    saved = open_images(tmp_path / "saved")
    assert isinstance(saved, DatasetImages) and saved.description["column"] == "picture"
    assert np.array_equal(contents(saved), images)
    for i in range(3):
        dataset.shard(3, i, contiguous=True).to_parquet(tmp_path / f"part-{i}.parquet")
    files = [str(tmp_path / f"part-{i}.parquet") for i in range(3)]
    streamed = open_images("parquet", data_files=files, streaming=True, split="train", image_column="picture")
    assert isinstance(streamed, StreamedImages) and streamed.num_lanes(4) == 3
    assert np.array_equal(contents(streamed), images)
    assert len(list(streamed.lane(1, 4, skip=3))) == 1


def test_streamed_files_that_were_replaced_are_another_set(tmp_path):
    described = []
    for seed in range(2):
        image_dataset(pixels(4) + seed).to_parquet(tmp_path / "data.parquet")
        for source in (("parquet", {"data_files": [str(tmp_path / "*.parquet")]}), (str(tmp_path), {})):
            described.append(open_dataset(source[0], streaming=True, split="train", **source[1]).description)
    assert described[0] != described[2] and described[1] != described[3]
    described.append(open_dataset(str(tmp_path), streaming=True, split="train").description)
    assert described[4] == described[3]


def test_numbers_in_lists_are_pixels_or_refused_and_no_image_is_left_out(tmp_path):
    images = pixels(5, 4, 4)
    floats = (images / 255).astype(np.float32)
    deep = images.astype(np.int32) * 256
    sources = {}
    for name, values in (("bytes", images), ("floats", floats), ("deep", deep)):
        Dataset.from_dict({"image": values.tolist()}).save_to_disk(tmp_path / name)
        sources[name] = open_images(tmp_path / name, image_column="image")
    assert np.array_equal(contents(sources["bytes"]), images)
    for name, dtype in (("floats", "float64"), ("deep", "int64")):
        with pytest.raises(UnreadableImage, match=rf"row 0 of .*{name} is an array \(4, 4, 3\) of {dtype}"):
            contents(sources[name])
    for value, told in (
        (None, "holds nothing, not an image. Repair or remove it, or pass --skip-corrupt"),
        ({"bytes": None, "path": str(tmp_path / "none.png")}, "none.png.* holds a path where there is no file"),
        ([[1, 2], [3]], "holds lists of different lengths"),
    ):
        with pytest.raises(UnreadableImage, match=told):
            stored_image("row 7", value)


def test_webdataset_is_streamed(tmp_path):
    import tarfile

    images = pixels(4)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"{i:04d}.png")
            member.size = len(png(image))
            archive.addfile(member, io.BytesIO(png(image)))
    source = open_images("webdataset", data_files=[str(tmp_path / "shard.tar")], streaming=True)
    assert source.description["column"] == "png"
    assert np.array_equal(contents(source), images)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images: no file ends in .jpg"):
        open_images(tmp_path)
    for missing in (tmp_path / "none", tmp_path / "none.npz", "./none"):
        with pytest.raises(FileNotFoundError, match="none"):
            open_images(missing)
    with pytest.raises(ValueError, match="split: options of a dataset"):
        open_images(tmp_path, split="train")
    (tmp_path / "one.png").touch()
    with pytest.raises(ValueError, match="one.png is a file: give a folder of images"):
        open_images(tmp_path / "one.png")
    run = tmp_path / "run"  # not ended: there are grids of samples, and no pipeline
    for name in ("samples/step-0.png", "checkpoint-1/model_index.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    with pytest.raises(ValueError, match="run is the folder of a run.*checkpoint-1, or one of its folders"):
        open_images(run)
    for name, arrays, message in (
        ("stats", {"mu": np.zeros(3)}, r"holds \['mu'\]: a sample holds its images as 'arr_0'"),
        ("float", {"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is \(2, 4, 4, 3\) of float64"),
        ("nchw", {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(N, H, W, 3\)"),
        ("empty", {"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / f"{name}.npz")
    dataset = image_dataset(pixels(2)).add_column("other", [1, 2])
    dataset.select_columns(["label", "other"]).save_to_disk(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"no column of images among \['label', 'other'\]: name one"):
        open_images(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"image_column='label' is not in"):
        image_dataset(pixels(2)).select_columns(["picture"]).save_to_disk(tmp_path / "only")
        open_images(tmp_path / "only", image_column="label")


def test_damage_within_a_sample_names_the_image(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", pixels(50))
    content = bytearray((tmp_path / "s.npz").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"s.npz is damaged"):
        contents(open_images(tmp_path / "s.npz"))
