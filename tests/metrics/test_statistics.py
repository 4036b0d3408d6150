# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trl_distreward import FeatureDistance, FeatureStatistics, SubsetReplaceReward
from trl_distreward.metrics.statistics import check_extractor, load_features


def moments(dimension=3, seed=0):
    rows = np.random.default_rng(seed).normal(size=(30, dimension))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def test_streaming_equals_the_whole():
    features = torch.randn(500, 6, dtype=torch.float64) * 3 + 1e4  # a large offset: sums of squares would cancel
    whole, streamed = FeatureStatistics.from_features(features), FeatureStatistics(6)
    for chunk in features.split(37):
        streamed.update(chunk)
    for statistics in (whole, streamed):
        assert statistics.count == 500
        torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(statistics.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-9)


def test_bad_features_are_refused():
    bad = torch.tensor([[1.0, 2.0], [1.0, torch.nan]])
    for update, message in (
        (lambda: FeatureStatistics.from_features(bad), "NaN or infinite values in 1 of 2 rows"),
        (lambda: FeatureStatistics.from_features(torch.randn(2, 3, 4)), r"\(N, d\), got \(2, 3, 4\)"),
        (lambda: FeatureStatistics(3).update(torch.randn(2, 4)), "dimension 4"),
        (lambda: FeatureStatistics.from_features(bad[:1]).covariance, "at least 2 vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            update()


def test_a_saved_file_loads_and_others_are_refused(tmp_path):
    path = tmp_path / "real.safetensors"
    statistics = FeatureStatistics.from_features(torch.randn(50, 4), metadata={"extractor": "test"})
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 50 and loaded.metadata == {"extractor": "test"}
    assert torch.equal(loaded.mean, statistics.mean)
    torch.testing.assert_close(loaded.covariance, statistics.covariance, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="would be read as another format"):
        statistics.save(tmp_path / "real.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["real.safetensors"]
    path.write_bytes(b"12345678garbage")
    with pytest.raises(ValueError, match="real.safetensors cannot be read as statistics"):
        FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        FeatureStatistics.load(tmp_path / "none.safetensors")


def test_npz_of_other_tools_is_read(tmp_path):
    pool, spatial = moments(), moments(4, seed=1)
    np.savez(tmp_path / "ref.npz", **pool, mu_s=spatial["mu"], sigma_s=spatial["sigma"], arr_0=np.zeros((2, 4, 4, 3)))
    for name, expected in (("inception", pool), ("inception-spatial", spatial)):
        loaded = FeatureStatistics.load(tmp_path / "ref.npz", name)
        assert loaded.count is None and loaded.metadata.get("extractor", "inception") == name
        assert np.array_equal(loaded.mean.numpy(), expected["mu"])
        np.testing.assert_allclose(loaded.covariance.numpy(), expected["sigma"])
    with pytest.raises(ValueError, match="count is unknown"):
        loaded.update(torch.randn(2, 4))
    np.savez(tmp_path / "sample.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="images: give it as a source"):
        FeatureStatistics.load(tmp_path / "sample.npz")


def spoiled(**entries):
    matrix = torch.eye(4).double()
    for place, value in entries.values():
        matrix[place] = value
    return matrix


@pytest.mark.parametrize(
    ("covariance", "count", "message"),
    [
        (-100 * torch.eye(4), None, "eigenvalue -100, or is not symmetric"),
        (spoiled(a=((0, 1), 1e6), b=((1, 0), 1e6)), 50, "eigenvalue -1e"),
        (spoiled(a=((0, 1), 0.5)), 50, "not symmetric"),
        (spoiled(a=((2, 2), torch.inf)), 50, "finite"),
        (torch.eye(4), 1, "count=1 must be a whole number of at least 2"),
        (torch.eye(4), 2.5, "count=2.5"),
        (torch.eye(4), 4, "rank 4, which needs more than 4 images"),
        (torch.eye(3), None, r"covariance \(3, 3\)"),
        (torch.eye(4), 5, None),
        (torch.zeros(4, 4), 5, None),
        (spoiled(a=((0, 1), 1.0), b=((1, 0), 1 + 1e-7)), 5, None),  # as float32 rounds
    ],
)
def test_statistics_that_are_none_are_refused_where_they_come_in(tmp_path, covariance, count, message):
    content = {"num_images": count, "fid": {"mu": np.zeros(4), "sigma": covariance.numpy()}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    for read in (
        lambda: FeatureStatistics.from_moments(torch.zeros(4), covariance, count),
        lambda: FeatureStatistics.load(tmp_path / "a.pkl", "inception"),
    ):
        if message is None:
            assert read().dimension == 4
            continue
        with pytest.raises(ValueError, match=message):
            read()


def test_a_flipped_bit_in_a_file_is_noticed(tmp_path):
    path, rows = tmp_path / "real.safetensors", torch.randn(9, 3)
    FeatureStatistics.from_features(rows, {"extractor": "test"}).save(path, rows)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    flipped = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(start, len(content), 5)]
    flipped += [content.replace(b'"count":"9"', b'"count":"8"'), content.replace(b"test", b"vest")]
    for damaged in flipped:
        path.write_bytes(damaged)
        for read in (FeatureStatistics.load, load_features):
            with pytest.raises(ValueError, match="it is damaged, as its digest shows"):
                read(path)
    path.write_bytes(content)
    assert FeatureStatistics.load(path).count == 9 and torch.equal(load_features(path), rows)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_small_archive_that_claims_gigabytes_is_refused(tmp_path, method):
    path, held = tmp_path / "a.npz", io.BytesIO()
    np.save(held, np.zeros((1200, 1200)))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("mu.npy", held.getvalue())
        archive.writestr("sigma.npy", held.getvalue())
    assert path.stat().st_size < 40_000
    with pytest.raises(ValueError, match="its member mu.npy claims 11520128 bytes"):
        FeatureStatistics.load(path)
    path = path.with_suffix(".safetensors")
    save_file({"mean": torch.zeros(3), "covariance": torch.zeros(2**15, 1)}, path)
    with pytest.raises(ValueError, match="32768 dimensions"):
        FeatureStatistics.load(path)


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def absurd_npz(path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue() + b"12345678")


def test_damaged_and_hostile_npz_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **moments(40))
    content = path.read_bytes()

    def hostile():
        np.savez(path, mu=np.array([Runs(os.system, f"touch {tmp_path / 'ran'}")], dtype=object), sigma=np.eye(1))

    for write, message in (
        (lambda: absurd_npz(path, (10**15,)), "allocate"),
        (lambda: absurd_npz(path, (10**6,)), "expected .* bytes got 8"),
        (hostile, "Object arrays cannot be loaded"),
        (lambda: path.write_bytes(content[: len(content) // 2]), "not a zip file"),
        (lambda: path.write_bytes(content[:5000] + b"????" + content[5004:]), "Bad CRC"),
        (lambda: np.savez(path, mu=np.zeros(3), sigma=np.eye(4)), r"mean has shape \(3,\)"),
    ):
        write()
        with pytest.raises(ValueError, match=f"a.npz cannot be read as statistics: .*{message}"):
            FeatureStatistics.load(path)
    assert not (tmp_path / "ran").exists()


def test_edm2_statistics_are_chosen_by_extractor(tmp_path):
    path = tmp_path / "img512.pkl"
    content = {"num_images": 30, "fid": moments(), "fd_dinov2": moments(5, seed=1)}
    path.write_bytes(pickle.dumps(content, protocol=4))
    resizes = {"inception": "tensorflow", "dinov2": "torch-bicubic-224"}
    for name, expected in (("inception", moments()), ("dinov2", moments(5, seed=1))):
        loaded = FeatureStatistics.load(path, name)
        about = {"source": "img512.pkl", "extractor": name, "resize": resizes[name]}
        assert loaded.count == 30 and loaded.metadata == about
        assert np.array_equal(loaded.mean.numpy(), expected["mu"])
        np.testing.assert_allclose(loaded.covariance.numpy(), expected["sigma"], rtol=1e-14)
    for wanted in (None, "clip"):
        with pytest.raises(ValueError, match=r"statistics of \['inception', 'dinov2'\], choose one"):
            FeatureStatistics.load(path, wanted)
    del content["fid"]
    path.write_bytes(pickle.dumps(content, protocol=4))
    assert FeatureStatistics.load(path).dimension == 5


def test_hostile_edm2_files_are_refused_and_run_nothing(tmp_path):
    path, marker = tmp_path / "a.pkl", tmp_path / "ran"
    good = pickle.dumps({"fid": moments()}, 4)
    hostile = Runs(os.system, f"touch {marker}")
    for content in (pickle.dumps(hostile), pickle.dumps({"fid": {"mu": hostile}}), good[: len(good) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.pkl cannot be read as statistics: "):
            FeatureStatistics.load(path, "inception")
    assert not marker.exists()


def test_statistics_of_another_extractor_are_refused():
    metadata = {"extractor": "dinov2", "resize": "torch-bicubic-224"}
    seen = {**metadata, "weights": "b", "dimension": 3}
    for held in ({**metadata, "dimension": 3}, {}):  # a file may say nothing
        check_extractor(held, seen)
    check_extractor({**metadata, "weights": "a"}, {**seen, "weights": None})
    for held, message in (
        ({"extractor": "clip"}, "extractor 'clip', but the images are seen with 'dinov2'.*recompute"),
        ({"resize": "pillow"}, "resize 'pillow'"),
        ({"weights": "a"}, "weights 'a'"),
        ({"dimension": 1024}, "dimension 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            check_extractor(held, seen)


class Named(torch.nn.Module):
    def __init__(self, name, resize):
        super().__init__()
        self.name, self.resize = name, resize

    def forward(self, images):
        return images.float().flatten(1)[:, :3]


@pytest.mark.parametrize("judge", [FeatureDistance, SubsetReplaceReward])
def test_rewards_and_metrics_refuse_statistics_of_another_extractor(judge, tmp_path):
    path = tmp_path / "real.safetensors"
    FeatureStatistics.from_features(torch.randn(9, 3), {"extractor": "dinov2", "resize": "torch"}).save(path)
    judge(Named("dinov2", "torch"), path)
    judge(lambda images: images.float().flatten(1)[:, :3], path)  # without a name
    for name, resize, message in (("inception", "torch", "extractor 'dinov2'"), ("dinov2", "pil", "resize 'torch'")):
        for real in (path, FeatureStatistics.load(path)):
            with pytest.raises(ValueError, match=f"{message}, but the images are seen with"):
                judge(Named(name, resize), real)
