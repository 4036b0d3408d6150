# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import pickle

import numpy as np
import pytest
import torch
from accelerate import PartialState

from tests.evaluation.images import pixels, project, project_pixels, write_folder
from tests.helpers import tiny_pipeline
from tests.runs import launch
from trl_distreward import FeatureStatistics, frechet_distance
from trl_distreward.metrics.scores import inception_score
from trl_distreward.scripts import evaluate, statistics

EXTRACTOR = ["--feature-extractor", "tests.evaluation.images.project"]
SMALL = ["--num-images", "40", "--num-inference-steps", "4", "--batch-size", "16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("base")
    np.savez("real.npz", pixels(60, 4, 4))
    return tmp_path


def run(*arguments, output="report.json"):
    evaluate.main([*EXTRACTOR, "--num-workers", "0", *map(str, arguments), "--output", output])
    with open(output) as file:
        return json.load(file)


def metrics_of(report):
    return report["results"][0]["metrics"]


def test_pipeline_and_a_file_of_its_images_give_the_same_report(folder, capsys):
    metrics = ["--metrics", "frechet", "kernel", "precision", "recall", "density", "coverage"]
    report = run("--model", "base", "--real", "real.npz", *SMALL, *metrics)
    assert report["images"] == 40 and set(metrics_of(report)) == set(metrics[1:])
    assert report["settings"]["schedule"]["num_steps"] == 4 and report["settings"]["guidance_scale"] == 1.0
    printed = capsys.readouterr().out
    assert "| base |" in printed and "| coverage |" in printed and f"{metrics_of(report)['frechet']:.5g}" in printed
    assert not (folder / "report.json.work").exists()
    source = evaluate.open_model(evaluate.make_parser().parse_args(["--model", "base", *SMALL]), PartialState())
    images = [image.content for i in range(source.num_shards(16)) for image in source.shard(i, 16)]
    np.savez("sample.npz", np.stack(images))
    again = run("--model", "sample.npz", "--real", "real.npz", *metrics, "--batch-size", 16, output="again.json")
    assert metrics_of(again) == metrics_of(report)


def test_values_are_those_of_the_features(folder):
    images = write_folder(folder / "images", 30, height=4, width=4)
    report = run("--model", "images", "--real", "real.npz")
    generated, real = (FeatureStatistics.from_features(project_pixels(i)) for i in (images, pixels(60, 4, 4)))
    assert metrics_of(report)["frechet"] == pytest.approx(frechet_distance(generated, real), rel=1e-5)


def test_fdr_is_the_mean_of_ratios_to_other_real_images(folder, capsys):
    images, other = write_folder(folder / "images", 30, height=4, width=4), pixels(90, 4, 4)[60:]
    np.savez("other.npz", other)
    spaces = ["tests.evaluation.images.project", "tests.evaluation.images.squared"]
    ratios = ["--model", "images", "--real", "real.npz", "--metrics", "frechet_ratio", "--feature-extractor", *spaces]
    found = [result["metrics"]["frechet_ratio"] for result in run(*ratios, "--other-real", "other.npz")["results"]]
    for power, ratio in zip((1, 2), found, strict=True):
        sets = (project_pixels(x).float() ** power for x in (images, other, pixels(60, 4, 4)))
        generated, others, real = map(FeatureStatistics.from_features, sets)
        expected = frechet_distance(generated, real) / frechet_distance(others, real)
        assert ratio == pytest.approx(expected, rel=1e-4)
    assert f"| FDr^k | mean | {sum(found) / 2:.5g} |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--other-real names 0 sets for 2 feature extractors"):
        run(*ratios)


def test_moments_serve_frechet_and_features_every_metric(folder):
    common = ["real.npz", *EXTRACTOR, "--num-workers", "0", "--output"]
    statistics.main([*common, "moments.safetensors"])
    statistics.main([*common, "features.safetensors", "--features"])
    frechet = metrics_of(run("--model", "real.npz", "--real", "moments.safetensors"))["frechet"]
    assert abs(frechet) < 1e-6
    found = metrics_of(run("--model", "real.npz", "--real", "features.safetensors", "--metrics", "frechet", "recall"))
    assert found["frechet"] == pytest.approx(frechet, abs=1e-12) and found["recall"] == 1
    with pytest.raises(ValueError, match="moments.safetensors holds no features"):
        run("--model", "real.npz", "--real", "moments.safetensors", "--metrics", "recall")


def refuse(*_, **__):
    raise AssertionError("images were generated")


def test_real_data_is_checked_before_images_are_generated(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "open_model", refuse)
    of_dinov2 = FeatureStatistics.from_features(torch.randn(20, 5), metadata={"extractor": "dinov2"})
    of_dinov2.save("dinov2.safetensors")
    np.savez("neither.npz", images=pixels(60, 4, 4))
    for message, *arguments in (
        ("extractor 'dinov2', but the images are seen with", "--real", "dinov2.safetensors"),
        ("--real names 2 sets for 1 feature extractors", "--real", "real.npz", "real.npz"),
        ("--real names 0 sets", "--metrics", "frechet"),
        ("none.npz", "--real", "none.npz"),
        ("none.safetensors", "--real", "none.safetensors"),
        ("inception_score needs Inception's logits", "--real", "real.npz", "--metrics", "inception_score"),
        ("neither.npz cannot be read as statistics", "--real", "neither.npz"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--model", "base", *SMALL, *arguments)


def test_two_reports_are_compared(folder, capsys):
    tiny_pipeline(seed=1).save_pretrained("tuned")
    before, after = (
        run("--model", name, "--real", "real.npz", *SMALL, output=f"{name}.json") for name in ("base", "tuned")
    )
    capsys.readouterr()
    evaluate.main(["--compare", "base.json", "tuned.json"])
    change = 100 * (metrics_of(after)["frechet"] / metrics_of(before)["frechet"] - 1)
    assert f"| {change:+.1f} % |" in capsys.readouterr().out


def test_both_families_of_grids_can_be_asked_for(folder):
    karras = {"solver": "heun_sigma", "time_grid": "karras"}
    for options, expected in (
        ("", {"last_step_size": 0.04}),
        ("--last-step-size 0", {"last_step_size": 0}),
        ("--sampler ode --solver heun_sigma --time-grid karras", {"last_step_size": "auto", **karras}),
    ):
        report = run("--model", "base", "--real", "real.npz", *SMALL, *options.split())
        assert expected.items() <= report["settings"]["schedule"].items()


def test_guidance_acts_on_as_many_channels_as_asked(folder):
    tiny_pipeline(in_channels=3).save_pretrained("rgb")
    guided = ["--model", "rgb", "--real", "real.npz", *SMALL, "--guidance-scale", "4"]
    reports = [run(*guided), run(*guided, "--guidance-channels", "3"), run(*guided, "--guidance-channels", "1")]
    whole, all_three, one = (metrics_of(report)["frechet"] for report in reports)
    assert whole == all_three != one
    assert [report["settings"].get("guidance_channels") for report in reports] == [None, 3, 1]


def test_kept_work_is_not_repeated(folder, monkeypatch):
    arguments = ["--model", "base", "--real", "real.npz", *SMALL, "--work-dir", "work"]
    run(*arguments)
    monkeypatch.setattr("trl_distreward.evaluation.generated.generate_images", refuse)
    assert set(metrics_of(run(*arguments, "--metrics", "kernel"))) == {"kernel"}


class FakeInception(torch.nn.Module):
    dimension = 5

    def __init__(self, output="pool3", resize="tensorflow"):
        super().__init__()
        self.output, self.resize = output, resize
        self.name = "inception" if output == "pool3" else f"inception-{output}"

    def forward(self, images):
        return project(images) if self.output == "pool3" else 2 - project(images) ** 2

    def logits(self, features):
        return features[:, :3] * 4


def test_moments_in_files_serve_only_the_resize_they_were_made_with(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda spec: FakeInception(resize=spec.partition("=")[2]))
    moments = {"mu": np.zeros(5), "sigma": np.eye(5)}
    np.savez("reference.npz", arr_0=pixels(60, 4, 4), **moments)
    with open("edm2.pkl", "wb") as file:
        pickle.dump({"fid": moments, "num_images": 60}, file)

    def frechet(real, resize):
        return metrics_of(run("--model", "real.npz", "--real", real, "--feature-extractor", f"inception,{resize}"))

    adm = frechet("reference.npz", "resize=tensorflow")["frechet"]
    assert adm > 1 and frechet("edm2.pkl", "resize=tensorflow")["frechet"] == pytest.approx(adm)
    assert abs(frechet("reference.npz", "resize=clean")["frechet"]) < 1e-6  # computed from its images
    with pytest.raises(ValueError, match="edm2.pkl has resize 'tensorflow', but the images are seen with 'clean'"):
        frechet("edm2.pkl", "resize=clean")


def test_inception_score_comes_from_pool3_features(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", FakeInception)
    images = write_folder(folder / "images", 30, height=4, width=4)
    arguments = ["--model", "images", "--real", "real.npz", "--feature-extractor"]
    both = run(*arguments, "pool3", "spatial", "--metrics", "frechet", "inception_score")
    pool3, spatial = (result["metrics"] for result in both["results"])
    assert set(pool3) == {"frechet", "inception_score", "inception_score_std"} and set(spatial) == {"frechet"}
    assert pool3["inception_score"] == pytest.approx(inception_score(4 * project_pixels(images)[:, :3], seed=0)[0])
    for name, expected in (("pool3", pool3), ("spatial", spatial)):
        assert metrics_of(run(*arguments, name))["frechet"] == expected["frechet"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_what_one_does(folder):
    arguments = ["--model", folder / "base", "--real", folder / "real.npz", *SMALL]
    alone = run(*arguments)
    result = launch("-m", "trl_distreward", "evaluate", *arguments, *EXTRACTOR, "--output", folder / "two.json")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((folder / "two.json").read_text()) == alone
