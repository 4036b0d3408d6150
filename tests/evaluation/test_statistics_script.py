# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from safetensors import safe_open

from tests.clip import coloured, save_tiny_clip
from tests.evaluation.images import pixels, project, write_folder
from tests.helpers import launch
from trl_distreward import FeatureStatistics, JointTextFeatures, load_clip
from trl_distreward.metrics.checks import load_real_features
from trl_distreward.scripts import statistics

PROJECT = ["--feature-extractor", "tests.evaluation.images.project"]


def run(source, output, *extra, extractor=PROJECT):
    statistics.main([str(source), "--output", str(output), *extractor, *map(str, extra)])
    return FeatureStatistics.load(output)


def test_file_holds_moments_features_and_what_they_are_of(tmp_path, capsys):
    images = pixels(90)
    np.savez(tmp_path / "s.npz", images)
    output = tmp_path / "real.safetensors"
    loaded = run(tmp_path / "s.npz", output, "--features", "--batch-size", 16)
    features = project(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = FeatureStatistics.from_features(features)
    assert loaded.count == 90
    torch.testing.assert_close(loaded.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_real_features(output), features, rtol=1e-5, atol=1e-5)
    said = loaded.metadata
    assert said["extractor"] == PROJECT[1] and said["source"].endswith("s.npz") and said["image_size"] == "8x8"
    assert said["library"].startswith("trl-distreward ") and "pillow" in said["versions"]
    assert "90 images (90 RGB), 0 skipped, 5 features" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.safetensors", "s.npz"]
    moments_only = run(tmp_path / "s.npz", tmp_path / "moments.safetensors", "--batch-size", 16)
    assert torch.equal(moments_only.mean, loaded.mean)
    with safe_open(tmp_path / "moments.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["covariance", "mean"]


def test_features_stand_beside_prompts(tmp_path):
    clip, (images, prompts) = load_clip(save_tiny_clip(tmp_path / "clip")), coloured(9)
    columns = {
        "picture": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
        "caption": prompts,
        "number": range(9),
    }
    kinds = {"picture": ImageColumn(), "caption": Value("string"), "number": Value("int64")}
    dataset = Dataset.from_dict(columns, features=Features(kinds))
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "part.parquet")
    encoder = ["--prompt-encoder", tmp_path / "clip", "--prompt-column", "caption"]
    stream = ["--data-files", tmp_path / "part.parquet", "--streaming", "--split", "train"]
    for number, (source, extractor, scale) in enumerate(
        (("saved", None, 1.0), ("parquet", None, 1.0), ("saved", "tests.evaluation.images.project", 2.0))
    ):
        more = stream if source == "parquet" else []
        options = [] if extractor is None else ["--feature-extractor", extractor]
        at = "parquet" if source == "parquet" else tmp_path / source
        output = tmp_path / f"{number}.safetensors"
        made = run(at, output, *encoder, "--prompt-scale", scale, "--batch-size", 4, *more, extractor=options)
        joint = JointTextFeatures(clip if extractor is None else project, clip.prompts, scale)
        expected = FeatureStatistics.from_features(joint(images, prompts))
        torch.testing.assert_close(made.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.covariance, expected.covariance, rtol=1e-4, atol=1e-5)
        assert made.metadata["extractor"].endswith(f"+text-{scale:g}")
    for options, message in (
        (
            ["--prompt-encoder", tmp_path / "clip"],
            r"prompt_column='prompt' is not in .*\['picture', 'caption', 'number'\]",
        ),
        ([*encoder[:2], "--prompt-column", "number"], "row 0 of .* holds 0 in 'number', not a prompt"),
        (["--prompt-column", "caption"], "say how --prompt-encoder is used, which is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "saved", tmp_path / "wrong.safetensors", *options, extractor=[])


@pytest.mark.distributed
def test_processes_that_were_killed_end_with_the_file_that_one_writes_undisturbed(tmp_path):
    write_folder(tmp_path / "images", 200, height=4, width=4)
    shared = [tmp_path / "images", "--features", "--batch-size", 3]  # 34 lanes of two batches
    shared += ["--feature-extractor", "tests.evaluation.images.project_or_die"]
    statistics.main([*map(str, shared), "--output", str(tmp_path / "one.safetensors")])
    output = tmp_path / "two.safetensors"
    killed = launch("-m", "trl_distreward.scripts.statistics", *shared, "--output", output, DIES_IN="8")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr[-2000:]
    done = [json.loads(path.read_text())["rows"] for path in tmp_path.glob("two.safetensors.work/lane-*.json")]
    assert 0 < sum(done) < 200 and not output.exists()
    result = launch("-m", "trl_distreward.scripts.statistics", *shared, "--output", output)
    assert result.returncode == 0, result.stderr[-3000:]
    assert output.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_what_cannot_be_right_is_refused_at_once(tmp_path):
    np.savez(tmp_path / "s.npz", pixels(4))
    with pytest.raises(ValueError, match="must end in .safetensors"):
        run(tmp_path / "s.npz", tmp_path / "real.npz")
    (tmp_path / "r.safetensors").mkdir()
    with pytest.raises(ValueError, match="r.safetensors is a folder: name a file"):
        run(tmp_path / "s.npz", tmp_path / "r.safetensors")
    (tmp_path / "r.safetensors").rmdir()
    for spec, message in (
        ("inception,colour=3", r"has options \['colour'\]: a feature extractor has source"),
        ("inception,size=3", "inception has no option size: it takes source, resize, output, sha256"),
        ("dinov2,output=spatial", "dinov2 has no option output: it takes source, resize, pooling, size"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "s.npz", tmp_path / "r.safetensors", extractor=["--feature-extractor", spec])
