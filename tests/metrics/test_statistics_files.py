# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trl_distreward import FeatureDistance, FeatureStatistics, SubsetReplaceReward, frechet_distance
from trl_distreward.metrics import extractors as features
from trl_distreward.metrics.distance import build_distance
from trl_distreward.metrics.inception import InceptionV3
from trl_distreward.metrics.numpy_pickle import load_numpy_pickle
from trl_distreward.metrics.statistics import check_extractor
from trl_distreward.scripts.common import find_extractor


def moments(dimension=3, seed=0):
    rows = np.random.default_rng(seed).normal(size=(30, dimension))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def edm2_file(path, protocol=4, **entries):
    content = entries or {"num_images": 30, "fid": moments(), "fd_dinov2": moments(5, seed=1)}
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_edm2_statistics_are_read_by_extractor_from_every_protocol(tmp_path, protocol):
    path = edm2_file(tmp_path / "img512.pkl", protocol)
    for name, expected in (("inception", moments()), ("dinov2", moments(5, seed=1))):
        loaded = FeatureStatistics.load(path, name)
        assert loaded.count == 30 and loaded.metadata == {"source": "img512.pkl", "extractor": name}
        assert np.array_equal(loaded.mean.numpy(), expected["mu"])
        np.testing.assert_allclose(loaded.covariance.numpy(), expected["sigma"], rtol=1e-14)
    with pytest.raises(ValueError, match="statistics of inception, dinov2: say which"):
        FeatureStatistics.load(path)
    with pytest.raises(ValueError, match="not of 'clip'"):
        FeatureStatistics.load(path, "clip")


def test_arrays_of_every_layout_come_out_as_they_went_in(tmp_path):
    square = np.arange(12.0).reshape(3, 4)
    arrays = {"f": np.asfortranarray(square), "big": square.astype(">f8"), "half": square.astype(np.float16)}
    arrays |= {"view": square[:, ::2], "scalar": np.float32(2.5), "int": np.arange(4)}
    for protocol in (2, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": arrays, "again": arrays}, protocol))
        loaded = load_numpy_pickle(tmp_path / "a.pkl")
        for name, array in arrays.items():
            assert np.array_equal(loaded["a"][name], array) and loaded["again"][name] is loaded["a"][name]


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(marker):
    command = f"touch {marker}"
    good = pickle.dumps(moments(), 4)
    yield "system", pickle.dumps(Runs(os.system, command)), "asks for posix.system"
    yield "nested", pickle.dumps({"fid": {"mu": Runs(eval, f"open({str(marker)!r}, 'w')")}}), "asks for builtins.eval"
    yield "getattr", pickle.dumps(Runs(getattr, "a", "b")), "asks for builtins.getattr"
    yield "instance", f"(S'{command}'\nios\nsystem\n.".encode(), "asks for os.system"
    yield "torch", b"ctorch.storage\n_load_from_bytes\n(B\x00\x00\x00\x00tR.", "asks for torch.storage"
    yield "numpy itself", b"cnumpy\nload\n(tR.", "asks for numpy.load"
    yield "dotted", b"\x80\x04\x8c\x05numpy\x8c\x0bcore.system\x93.", "asks for numpy.core.system"
    yield "persistent", b"Pevil\n.", "objects outside"
    yield "objects", pickle.dumps({"mu": np.array([Runs(os.system, command)], dtype=object)}), "dtype|asks for"
    yield "new object", b"\x80\x02cnumpy\ndtype\n)\x81.", "refused"
    yield "truncated", good[: len(good) // 2], "refused"
    yield "empty", b"", "refused"
    yield "not a pickle", b"\x89PNG\r\n\x1a\n", "refused"
    yield "memo of 4 billion", b"\x80\x02Nr\xff\xff\xff\xff.", None
    yield "bytes to be filled", b"\x80\x05\x96" + (3 * 10**8).to_bytes(8, "little") + b"x.", "claims 300000000 bytes"
    yield "bytes that are not there", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "refused"


def claiming_pickle(shape, values=b"12345678"):
    """A pickle of arrays that claim a shape."""

    class Claim:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype("f8"), False, values)

    return pickle.dumps({"mu": Claim(), "sigma": Claim()}, 2)


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    marker = tmp_path / "ran"
    tracemalloc.start()
    for name, content, message in hostile_pickles(marker):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        if message is None:  # malformed in no way that matters: it must only take no memory
            assert load_numpy_pickle(path) is None
        else:
            with pytest.raises(ValueError, match=message):
                load_numpy_pickle(path)
        assert not marker.exists(), name
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(10**12,), (2**62, 2**62), (-1,), (3,), (1.0,), (10**400,)])
def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path, shape):
    (tmp_path / "a.pkl").write_bytes(claiming_pickle(shape))
    with pytest.raises(ValueError, match="an array claims"):
        load_numpy_pickle(tmp_path / "a.pkl")


def test_dictionaries_that_hold_one_another_end(tmp_path):
    content = {"a": {}}
    content["a"]["b"] = content
    for _ in range(60):  # 2⁶⁰ paths through 60 dictionaries
        content = {"a": content, "b": content}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert load_numpy_pickle(tmp_path / "a.pkl")["a"]["b"].keys() == {"a", "b"}


def test_spatial_moments_of_a_reference_batch_are_read_by_name(tmp_path):
    pool, spatial = moments(), moments(4, seed=1)
    np.savez(tmp_path / "ref.npz", **pool, mu_s=spatial["mu"], sigma_s=spatial["sigma"], arr_0=np.zeros((2, 4, 4, 3)))
    assert np.array_equal(FeatureStatistics.load(tmp_path / "ref.npz", "inception").mean.numpy(), pool["mu"])
    loaded = FeatureStatistics.load(tmp_path / "ref.npz", "inception-spatial")
    assert np.array_equal(loaded.mean.numpy(), spatial["mu"]) and loaded.count is None
    np.savez(tmp_path / "sample.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"It holds images: give it as a source"):
        FeatureStatistics.load(tmp_path / "sample.npz")


def absurd_npz(path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue() + b"12345678")


def test_damaged_and_hostile_npz_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    absurd_npz(path, (10**15,))
    with pytest.raises(ValueError, match=r"a.npz is damaged: array 'mu' claims shape \(1000000000000000,\)"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.array([Runs(os.system, f"touch {tmp_path / 'ran'}")], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="dtype object"):
        FeatureStatistics.load(path)
    assert not (tmp_path / "ran").exists()
    np.savez(path, **moments(40))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or not an .npz"):
        FeatureStatistics.load(path)
    path.write_bytes(content[:5000] + b"????" + content[5004:])
    with pytest.raises(ValueError, match="damaged"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"a.npz holds no statistics: mean has shape \(3,\)"):
        FeatureStatistics.load(path)


def test_statistics_of_another_extractor_are_refused(tmp_path):
    statistics = FeatureStatistics.from_features(
        torch.randn(9, 3), metadata={"extractor": "dinov2", "resize": "torch-bicubic-224"}
    )
    statistics.save(tmp_path / "real.safetensors")
    assert FeatureStatistics.load(tmp_path / "real.safetensors", "dinov2").dimension == 3
    with pytest.raises(ValueError, match="extractor 'dinov2', but the images are seen with 'inception'.*recompute"):
        FeatureStatistics.load(tmp_path / "real.safetensors", "inception")
    held = statistics.metadata
    check_extractor(held, 3, extractor="dinov2", resize="torch-bicubic-224", extractor_dimension=3)
    check_extractor({}, 3, extractor="anything", resize="any")  # a file that does not say
    with pytest.raises(ValueError, match="resize 'torch-bicubic-224', but the images are seen with 'pillow'"):
        check_extractor(held, 3, extractor="dinov2", resize="pillow")
    with pytest.raises(ValueError, match="weights 'a', but the images are seen with 'b'"):
        check_extractor({**held, "weights": "a"}, 3, extractor="dinov2", weights="b")
    check_extractor(held, 3, extractor="dinov2", weights="b")
    with pytest.raises(ValueError, match="dimension 3, but 'dinov2' gives 1024"):
        check_extractor(held, 3, extractor="dinov2", extractor_dimension=1024)


@pytest.mark.parametrize(
    ("output", "resize", "option"),
    [
        ("spatial", "tensorflow", "inception,output=spatial"),
        ("pool3", "clean", "inception,resize=clean"),
        ("logits_unbiased", "pytorch", "inception,output=logits_unbiased,resize=pytorch"),
    ],
)
def test_remedy_names_an_extractor_that_there_is(monkeypatch, output, resize, option):
    monkeypatch.setattr(features, "load_inception", lambda source, device, **options: InceptionV3(**options))
    with torch.device("meta"):
        wanted, named = InceptionV3(resize, output), find_extractor(option)
    assert (named.name, named.resize) == (wanted.name, wanted.resize)
    with pytest.raises(ValueError, match=f"--feature-extractor {option}\\."):
        check_extractor({"extractor": "dinov2"}, 3, extractor=wanted.name, resize=wanted.resize)


class Named(torch.nn.Module):
    def __init__(self, name, resize):
        super().__init__()
        self.name, self.resize = name, resize

    def forward(self, images):
        return images.float().flatten(1)[:, :3]


def test_rewards_and_metrics_refuse_statistics_of_another_extractor(tmp_path):
    metadata = {"extractor": "dinov2", "resize": "torch"}
    path = tmp_path / "real.safetensors"
    FeatureStatistics.from_features(torch.randn(9, 3), metadata=metadata).save(path)
    for judge in (FeatureDistance, SubsetReplaceReward):
        judge(Named("dinov2", "torch"), path)
        judge(lambda images: images.float().flatten(1)[:, :3], path)  # which has no name
        for name, resize, message in (
            ("inception", "torch", "extractor 'dinov2'"),
            ("dinov2", "pil", "resize 'torch'"),
        ):
            for real in (path, FeatureStatistics.load(path)):
                with pytest.raises(ValueError, match=f"{message}, but the images are seen with"):
                    judge(Named(name, resize), real)


def test_files_with_features_serve_every_distance(tmp_path):
    features = torch.randn(9, 3)
    statistics = FeatureStatistics.from_features(features)
    both = {"features": features, "mean": statistics.mean, "covariance": statistics.covariance}
    save_file(both, tmp_path / "both.safetensors", metadata={"count": "9"})
    save_file({"features": features}, tmp_path / "features.safetensors")
    generated = torch.randn(20, 3)
    for path in (tmp_path / "both.safetensors", tmp_path / "features.safetensors"):
        value = build_distance("frechet", path).fit(generated).value
        assert value == pytest.approx(frechet_distance(FeatureStatistics.from_features(generated), statistics))
        build_distance("kernel", path).fit(generated)
        assert torch.equal(build_distance(lambda real: real, path), features)
