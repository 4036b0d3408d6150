# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from trl_distreward import FeatureStatistics


def test_streaming_and_merging_equal_the_whole():
    features = torch.randn(500, 6, dtype=torch.float64) * 3 + 1e4  # a large offset: sums of squares would cancel
    whole = FeatureStatistics.from_features(features)
    streamed, first, second = FeatureStatistics(6), FeatureStatistics(6), FeatureStatistics(6)
    for chunk in features.split(37):
        streamed.update(chunk)
    first.update(features[:123])
    second.update(features[123:])
    first.merge(second)
    expected = torch.cov(features.T)
    for statistics in (whole, streamed, first):
        assert statistics.count == 500
        torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(statistics.covariance, expected, rtol=1e-9, atol=1e-9)


def test_save_and_load(tmp_path):
    statistics = FeatureStatistics.from_features(torch.randn(50, 4), metadata={"extractor": "test"})
    statistics.save(tmp_path / "real.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "real.safetensors")
    assert loaded.count == 50 and loaded.metadata == {"extractor": "test"}
    assert torch.equal(loaded.mean, statistics.mean)
    torch.testing.assert_close(loaded.covariance, statistics.covariance, rtol=1e-15, atol=0)
    for name in ("real.npz", "real.pkl"):  # which would be read as another format
        with pytest.raises(ValueError, match=f"{name} would be a safetensors file"):
            statistics.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["real.safetensors"]


def test_reads_npz_of_other_tools(tmp_path):
    features = np.random.default_rng(0).normal(size=(30, 3))
    np.savez(tmp_path / "adm.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    loaded = FeatureStatistics.load(tmp_path / "adm.npz")
    assert loaded.count is None and loaded.mean.dtype == torch.float64
    np.testing.assert_allclose(loaded.covariance.numpy(), np.cov(features, rowvar=False))
    with pytest.raises(ValueError, match="count is unknown"):
        loaded.update(torch.randn(2, 3))


def test_refuses_bad_input(tmp_path):
    features = torch.randn(5, 3)
    features[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of 5 rows \(2\)"):
        FeatureStatistics.from_features(features)
    with pytest.raises(ValueError, match=r"\(N, d\), got \(2, 3, 4\)"):
        FeatureStatistics.from_features(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="dimension 4"):
        FeatureStatistics(3).update(torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        FeatureStatistics.from_features(torch.randn(1, 3)).covariance  # noqa: B018
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        FeatureStatistics.load(tmp_path / "none.safetensors")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="'mu' and 'sigma'"):
        FeatureStatistics.load(tmp_path / "images.npz")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678garbage")
    with pytest.raises(ValueError, match="damaged"):
        FeatureStatistics.load(tmp_path / "broken.safetensors")
