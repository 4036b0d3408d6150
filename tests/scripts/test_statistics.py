# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.clip import coloured, save_tiny_clip
from tests.evaluation.images import pixels, project, project_pixels, write_folder
from tests.runs import launch
from trl_distreward import FeatureStatistics, JointTextFeatures, load_clip
from trl_distreward.metrics.statistics import load_features
from trl_distreward.scripts import statistics

PROJECT = ["--feature-extractor", "tests.evaluation.images.project"]


def run(source, output, *extra, extractor=PROJECT):
    statistics.main([str(source), "--output", str(output), "--num-workers", "0", *map(str, [*extractor, *extra])])
    return FeatureStatistics.load(output)


def test_file_holds_moments_features_and_their_origin(tmp_path, capsys):
    images = pixels(90)
    np.savez(tmp_path / "s.npz", images)
    output = tmp_path / "real.safetensors"
    loaded = run(tmp_path / "s.npz", output, "--features", "--batch-size", 16)
    features = project_pixels(images)
    expected = FeatureStatistics.from_features(features)
    assert loaded.count == 90
    torch.testing.assert_close(loaded.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_features(output), features, rtol=1e-5, atol=1e-5)
    assert loaded.metadata["extractor"] == PROJECT[1] and loaded.metadata["source"].endswith("s.npz")
    assert loaded.metadata["library"].startswith("trl-distreward ") and "pillow" in loaded.metadata["library"]
    assert "5 features of 90 images" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.safetensors", "s.npz"]
    moments_only = run(tmp_path / "s.npz", tmp_path / "moments.safetensors", "--batch-size", 16)
    assert torch.equal(moments_only.mean, loaded.mean)
    with safe_open(tmp_path / "moments.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["covariance", "mean"]


def test_features_are_joined_to_prompts(tmp_path):
    clip, (images, prompts) = load_clip(save_tiny_clip(tmp_path / "clip")), coloured(9)
    columns = {"picture": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], "caption": prompts}
    dataset = Dataset.from_dict(columns, features=Features({"picture": ImageColumn(), "caption": Value("string")}))
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "part.parquet")
    encoder = ["--prompt-encoder", tmp_path / "clip", "--prompt-column", "caption", "--batch-size", 4]
    stream = ["--data-files", tmp_path / "part.parquet", "--streaming", "--split", "train"]
    saved, output = tmp_path / "saved", tmp_path / "joint.safetensors"
    for source, options, extractor, scale in (
        (saved, [], None, 1.0),
        ("parquet", stream, None, 1.0),
        (saved, PROJECT, project, 2.0),
    ):
        made = run(source, output, *encoder, "--prompt-scale", scale, extractor=options)
        joint = JointTextFeatures(clip if extractor is None else extractor, clip.prompts, scale)
        expected = FeatureStatistics.from_features(joint(images, prompts))
        torch.testing.assert_close(made.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.covariance, expected.covariance, rtol=1e-4, atol=1e-5)
        assert made.metadata["extractor"].endswith(f"+text-{scale:g}")
    with pytest.raises(ValueError, match="has the columns picture, caption"):
        run(saved, output, "--prompt-encoder", tmp_path / "clip", extractor=[])


@pytest.mark.distributed
def test_killed_processes_end_with_the_file_of_one_undisturbed_process(tmp_path):
    write_folder(tmp_path / "images", 200, height=4, width=4)
    shared = [tmp_path / "images", "--features", "--batch-size", 3]  # 34 shards of two batches
    shared += ["--feature-extractor", "tests.evaluation.images.project_or_die"]
    statistics.main([*map(str, shared), "--output", str(tmp_path / "one.safetensors")])
    output = tmp_path / "two.safetensors"
    killed = launch("-m", "trl_distreward", "statistics", *shared, "--output", output, DIES_IN="20")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr[-2000:]
    assert 0 < len(list(tmp_path.glob("two.safetensors.work/features-*"))) < 34 and not output.exists()
    result = launch("-m", "trl_distreward", "statistics", *shared, "--output", output)
    assert result.returncode == 0, result.stderr[-3000:]
    one = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(value, one[name]) for name, value in load_file(output).items())
