# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import pickle

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from tests.evaluation.images import pixels, project, write_folder
from tests.helpers import launch, tiny_pipeline
from trl_distreward import FeatureStatistics, frechet_distance
from trl_distreward.evaluation.measure import fewest_images
from trl_distreward.metrics import feature_metrics
from trl_distreward.metrics.scores import METRICS
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
    evaluate.main([*EXTRACTOR, *map(str, arguments), "--output", output])
    with open(output) as file:
        return json.load(file)


def metrics_of(report):
    return report["results"][0]["metrics"]


def test_pipeline_and_its_sample_file_give_the_same_report(folder, capsys):
    metrics = ["--metrics", "frechet", "kernel", "precision", "recall", "density", "coverage"]
    outputs = ["--save-npz", "sample.npz", "--markdown", "report.md", "--update-card", "base"]
    report = run("--model", "base", "--real", "real.npz", *SMALL, *metrics, *outputs)
    assert report["images"] == 40 and set(metrics_of(report)) == set(metrics[1:])
    printed = capsys.readouterr().out
    assert "base: 40 images" in printed and "coverage" in printed
    assert f"{metrics_of(report)['frechet']:.5g}" in (folder / "report.md").read_text()
    assert len(ModelCard.load("base/README.md").data.eval_results) == 6
    assert not (folder / "report.json.work").exists()
    again = run("--model", "sample.npz", "--real", "real.npz", *metrics, "--batch-size", 16, output="again.json")
    assert metrics_of(again) == metrics_of(report)


def test_values_are_those_of_the_features(folder):
    images = write_folder(folder / "images", 30, height=4, width=4)
    report = run("--model", "images", "--real", "real.npz", "--metrics", "fid")
    generated, real = (
        FeatureStatistics.from_features(project(torch.from_numpy(i).permute(0, 3, 1, 2)))
        for i in (images, pixels(60, 4, 4))
    )
    assert metrics_of(report)["fid"] == pytest.approx(frechet_distance(generated, real), rel=1e-5)


def test_statistics_serve_frechet_and_features_all(folder):
    common = ["real.npz", *EXTRACTOR, "--output"]
    statistics.main([*common, "moments.safetensors"])
    statistics.main([*common, "features.safetensors", "--features"])
    frechet = metrics_of(run("--model", "real.npz", "--real", "moments.safetensors"))["frechet"]
    assert abs(frechet) < 1e-6
    found = metrics_of(run("--model", "real.npz", "--real", "features.safetensors", "--metrics", "frechet", "recall"))
    assert found["frechet"] == pytest.approx(frechet, abs=1e-12) and found["recall"] == 1
    with pytest.raises(ValueError, match="recall of .*moments.safetensors holds moments alone: give real images, or"):
        run("--model", "real.npz", "--real", "moments.safetensors", "--metrics", "recall")


def test_misfits_are_refused_before_anything_is_generated(folder):
    def refused(message, *arguments):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--model", "base", *SMALL, *arguments)
        assert not (folder / "report.json.work" / "images").exists()

    of_dinov2 = FeatureStatistics.from_features(torch.randn(20, 5), metadata={"extractor": "dinov2"})
    of_dinov2.save("dinov2.safetensors")
    refused("extractor 'dinov2', but the images are seen with", "--real", "dinov2.safetensors")
    refused("--real names 2 sets for 1 feature extractors", "--real", "real.npz", "real.npz")
    refused("no file none.npz", "--real", "none.npz")
    refused("no statistics file at none.safetensors", "--real", "none.safetensors")
    refused("--real names 0 sets", "--metrics", "frechet")
    refused("inception_score is of Inception's logits", "--real", "real.npz", "--metrics", "inception_score")
    FeatureStatistics.from_features(torch.randn(20, 7)).save("other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors has dimension 7, but .* gives 5"):
        run("--model", "real.npz", "--real", "other.safetensors")
    np.savez("neither.npz", images=pixels(60, 4, 4))
    refused(r"neither.npz holds \['images'\]: .*neither statistics nor features nor", "--real", "neither.npz")
    save_file({"rows": torch.zeros(2, 5)}, "neither.safetensors")
    refused("neither.safetensors holds .'rows'.: .*neither statistics", "--real", "neither.safetensors")
    refused("--spread 1 must be at least 2", "--real", "real.npz", "--spread", 1)
    refused("num_images=0 .* at least 2 images", "--real", "real.npz", "--num-images", 0)
    refused("no folder missing for a model card", "--real", "real.npz", "--update-card", "missing")
    assert not (folder / "missing").exists()
    for option in ("--markdown", "--save-npz"):
        refused(f"{option} base is a folder: name a file", "--real", "real.npz", option, "base")
    with pytest.raises(ValueError, match="--output base is a folder: name a file"):
        run("--model", "base", *SMALL, "--real", "real.npz", output="base")


def test_too_few_images_are_refused_before_any_is_generated(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", refuse_to_run)
    monkeypatch.setattr("trl_distreward.evaluation.collect._extract", refuse_to_run)
    FeatureStatistics.from_features(torch.randn(60, 11)).save("moments.safetensors")
    save_file({"features": torch.randn(5, 5)}, "features.safetensors")
    for message, *arguments in (
        ("kid of .*project needs 1000 generated images, but there are 40", "base", "real.npz", "kid"),
        (
            "kid of .*project needs 1000 real images, but there are 60",
            "base",
            "real.npz",
            "kid",
            "--num-images",
            1_000,
        ),
        ("recall of .*project needs 6 real images, but there are 5", "base", "features.safetensors", "recall"),
        ("fid_infinity of .*project needs 44 gen.* there are 40", "base", "moments.safetensors", "fid_infinity"),
        ("fid_infinity of .*project needs 44 gen.* there are 30", "few.npz", "moments.safetensors", "fid_infinity"),
    ):
        np.savez("few.npz", pixels(30, 4, 4))
        model, real, metric, *others = arguments
        size = SMALL if model == "base" else []
        with pytest.raises(ValueError, match=message):
            run("--model", model, "--real", real, *size, "--metrics", metric, *others)


@pytest.mark.parametrize("metric", METRICS)
def test_fewest_images_are_those_that_metrics_need(metric):
    random = torch.Generator().manual_seed(0)
    real = torch.randn(1_000, 2, generator=random)
    for spread in (0, 2):
        fewest = fewest_images(metric, 2, spread)
        rows = torch.randn(fewest, 2, generator=random)
        assert metric in feature_metrics(real, rows, [metric], logits=rows, spread=spread, kid_subsets=1)
        too_few = fewest - (2 if spread else 1)  # half of an odd number is rounded
        with pytest.raises(ValueError):
            feature_metrics(real, rows[:too_few], [metric], logits=rows[:too_few], spread=spread)


def test_options_without_effect_are_refused(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", refuse_to_run)
    monkeypatch.setattr("trl_distreward.evaluation.collect._extract", refuse_to_run)
    FeatureStatistics.from_features(torch.randn(60, 5)).save("moments.safetensors")

    def refused(message, *arguments, real="real.npz"):
        with pytest.raises(ValueError, match=message):
            run(*arguments, "--real", real)

    for option, value in (
        ("--num-images", 50_000),  # the default, but given
        ("--sampler", "ode"),
        ("--guidance-scale", 1.5),
        ("--labels", "random"),
        ("--dtype", "bfloat16"),
        ("--model-revision", "main"),
        ("--save-npz", "s.npz"),
    ):
        refused(f"{option}: of a pipeline's images, but real.npz holds images", "--model", "real.npz", option, value)
    refused("--sampler: of a pip.*but real.npz", "--compare", "a.json", "real.npz", "--sampler", "ode")
    refused("--model-revision is of the Hub, but base is a folder", "--model", "base", "--model-revision", "main")
    refused("--solver: of --sampler ode, but the sampler is sde", "--model", "base", "--solver", "heun")
    refused("--guidance-channels is of --guidance-scale", "--model", "base", "--guidance-channels", "1")
    refused("--noise-level: of --sampler sde", "--model", "base", "--sampler", "ode", "--noise-level", "0.5")
    for model in ("base", "real.npz"):
        dataset = ["--split", "train", "--streaming"]
        refused("--split, --streaming: of a dataset.*moments", "--model", model, *dataset, real="moments.safetensors")
    refused("--feature-extractor, --metrics, --real: of an ev", "--compare", "a.json", "b.json", "--metrics", "fid")
    with pytest.raises(ValueError, match="--num-images, --skip-corrupt: of an evaluation, but a.json and b.json are"):
        evaluate.main(["--compare", "a.json", "b.json", "--num-images", "40", "--skip-corrupt"])


def test_report_is_there_though_the_card_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(evaluate.reports, "update_card", refuse_to_run)
    with pytest.raises(AssertionError):
        run("--model", "real.npz", "--real", "real.npz", "--update-card", "base")
    assert json.loads((folder / "report.json").read_text())["images"] == 60


def test_only_what_the_run_wrote_is_removed(folder):
    kept = [
        folder / "report.json.work" / name for name in ("notes.txt", "images/mine.png", "images/deep/images-0.npy")
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run("--model", "base", "--real", "real.npz", *SMALL)
    assert sorted(path for path in (folder / "report.json.work").rglob("*") if path.is_file()) == sorted(kept)
    run("--compare", "base", "real.npz", "--real", "real.npz", "--num-images", 60, *SMALL[2:], output="both.json")
    assert not (folder / "both.json.work").exists()


def test_reference_batch_gives_moments_to_inception_and_images_to_others(folder):
    rows = np.random.default_rng(0).normal(size=(30, 2048))
    moments = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    np.savez("reference.npz", arr_0=pixels(60, 4, 4), **moments)
    look_at = evaluate.RealPath.look_at
    inception, other = look_at("reference.npz", "inception", "tensorflow"), look_at("reference.npz", "dinov2")
    assert (inception.moments, inception.images, other.moments, other.images) == (True, True, False, True)
    assert not inception.must_collect(False) and inception.must_collect(True) and other.must_collect(False)
    assert inception.moments_in_file().dimension == 2048
    for elsewise in (("inception", "clean"), ("inception-logits", "tensorflow"), ("inception-spatial", "tensorflow")):
        assert look_at("reference.npz", *elsewise).must_collect(False)


def test_names_are_shown_as_they_are(folder, capsys):
    folder.joinpath("a[red]b[").mkdir()
    np.savez("a[red]b[/c].npz", pixels(40, 4, 4))
    run("--model", "a[red]b[/c].npz", "--real", "real.npz")
    assert "a[red]b[/c].npz" in capsys.readouterr().out.replace("\n", "")


def test_comparison_is_of_reports_or_of_sources(folder, capsys):
    tiny_pipeline(seed=1).save_pretrained("tuned")
    first = run("--model", "base", "--real", "real.npz", *SMALL, output="base.json")
    compared = run("--compare", "base.json", "tuned", "--real", "real.npz", *SMALL, "--markdown", "change.md")
    second = metrics_of(compared["after"])["frechet"]
    change = 100 * (second / metrics_of(first)["frechet"] - 1)
    assert [change["percent"] for change in compared["changes"]] == [pytest.approx(change)]
    assert compared["before"] == first
    assert f"{change:+.1f} %" in capsys.readouterr().out and f"{change:+.1f} %" in (folder / "change.md").read_text()


def test_reports_that_cannot_be_compared_are_found_before_anything_is_generated(folder):
    run("--model", "base", "--real", "real.npz", *SMALL, output="base.json")
    few = ["--real", "real.npz", *SMALL, "--num-images", "20"]
    for sources, message in (
        (["base.json", "base"], "base.json is of 40 images, and --num-images is 20"),
        (["base", "none.json"], "no report at none.json"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--compare", *sources, *few)
        assert not (folder / "report.json.work").exists()


def test_comparison_leaves_the_reports_it_reads(folder):
    for name in ("evaluation.json", "after.json"):
        run("--model", "base", "--real", "real.npz", *SMALL, output=name)
    before = (folder / "evaluation.json").read_bytes()
    evaluate.main(["--compare", "evaluation.json", "after.json"])
    assert {"before", "after", "changes"} == set(json.loads((folder / "comparison.json").read_text()))
    for option in ("--output", "--markdown"):
        with pytest.raises(ValueError, match=rf"{option} .*evaluation.json is one of the reports that are compared"):
            evaluate.main(["--compare", "evaluation.json", "after.json", option, str(folder / "evaluation.json")])
    assert (folder / "evaluation.json").read_bytes() == before


def test_comparison_loses_no_value_and_mixes_no_preparation(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda spec: FakeInception(spec))
    write_folder(folder / "images", 30, height=4, width=4)
    spaces = ["--real", "real.npz", *EXTRACTOR[:1], "pool3", "spatial"]
    first = run("--model", "images", *spaces, output="first.json")
    assert (first["image_resize"], first["skip_corrupt"]) == (None, False)
    run("--model", "images", *spaces, "--seed", 1, output="second.json")
    evaluate.main(["--compare", "first.json", "second.json", "--output", "compared.json"])
    changes = json.loads((folder / "compared.json").read_text())["changes"]
    assert changes == [
        {"extractor": result["extractor"], "resize": "tensorflow", "metric": "frechet", "percent": 0.0}
        | dict.fromkeys(("before", "after"), result["metrics"]["frechet"])
        for result in first["results"]
    ]
    run("--model", "images", *spaces, "--resize", 4, output="resized.json")
    with pytest.raises(ValueError, match="made with --resize None and 4: evaluate both with the same"):
        evaluate.main(["--compare", "first.json", "resized.json"])


def test_grids_of_both_families_can_be_asked_for():
    parse = evaluate.make_parser().parse_args
    assert evaluate.schedule_of(parse(["--model", "m"])).last_step_size == 0.04
    assert evaluate.schedule_of(parse(["--model", "m", "--last-step-size", "0"])).last_step_size is None
    edm = ["--sampler", "ode", "--solver", "heun_sigma", "--time-grid", "karras", "--num-inference-steps", "32"]
    schedule = evaluate.schedule_of(parse(["--model", "m", *edm]))
    assert schedule.last_step_size is None and schedule.num_evaluations == 63


def test_guidance_is_of_as_many_channels_as_asked(folder):
    tiny_pipeline(in_channels=3).save_pretrained("rgb")
    guided = ["--model", "rgb", "--real", "real.npz", *SMALL, "--guidance-scale", "4"]
    reports = [run(*guided), run(*guided, "--guidance-channels", "3"), run(*guided, "--guidance-channels", "1")]
    whole, all_three, one = (metrics_of(report)["frechet"] for report in reports)
    assert whole == all_three != one
    assert [report["settings"].get("guidance_channels") for report in reports] == [None, 3, 1]


def test_work_that_is_kept_is_not_done_again(folder, monkeypatch):
    run("--model", "base", "--real", "real.npz", *SMALL, "--work-dir", "work")
    monkeypatch.setattr("trl_distreward.evaluation.generated.generate_images", None)
    monkeypatch.setattr("trl_distreward.evaluation.collect._extract", None)
    report = run("--model", "base", "--real", "real.npz", *SMALL, "--work-dir", "work", "--metrics", "kernel")
    assert set(metrics_of(report)) == {"kernel"}
    again = run("--model", "work/images", "--real", "real.npz", "--work-dir", "work", "--batch-size", 16)
    assert again["settings"] == report["settings"]


def refuse_to_run(*_):
    raise AssertionError("an image was made or looked at")


def test_moments_serve_only_the_resize_that_their_format_has(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda spec: FakeInception(resize=spec.partition("=")[2]))
    moments = {"mu": np.zeros(5), "sigma": np.eye(5)}
    np.savez("reference.npz", arr_0=pixels(60, 4, 4), **moments)
    with open("edm2.pkl", "wb") as file:
        pickle.dump({"fid": moments, "num_images": 60}, file)

    def frechet(real, resize):
        return metrics_of(run("--model", "real.npz", "--real", real, "--feature-extractor", f"inception,{resize}"))

    adm = frechet("reference.npz", "resize=tensorflow")["frechet"]
    assert adm > 1 and frechet("edm2.pkl", "resize=tensorflow")["frechet"] == pytest.approx(adm)
    assert abs(frechet("reference.npz", "resize=clean")["frechet"]) < 1e-6  # of its images, which are the same
    monkeypatch.setattr("trl_distreward.evaluation.collect._extract", refuse_to_run)
    with pytest.raises(ValueError, match="edm2.pkl has resize 'tensorflow', but the images are seen with 'clean'"):
        frechet("edm2.pkl", "resize=clean")


class FakeInception(torch.nn.Module):
    dimension = 5

    def __init__(self, output="pool3", resize="tensorflow"):
        super().__init__()
        self.output, self.resize = output, resize
        self.name = "inception" if output == "pool3" else f"inception-{output}"

    def outputs(self, images, names):
        features = project(images)
        found = {"pool3": features, "spatial": 2 - features**2, "logits_unbiased": features[:, :3] * 4}
        return {name: found[name] for name in names}

    def forward(self, images):
        return self.outputs(images, (self.output,))[self.output]


def test_inception_score_leaves_spatial_features_alone(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda spec: FakeInception(spec))
    write_folder(folder / "images", 30, height=4, width=4)
    arguments = ["--model", "images", "--real", "real.npz"]
    row = run(*arguments, "--metrics", "frechet", "inception_score", *EXTRACTOR[:1], "pool3", "spatial")
    pool3, spatial = (result["metrics"] for result in row["results"])
    assert set(pool3) == {"frechet", "inception_score", "inception_score_std"} and set(spatial) == {"frechet"}
    assert spatial == metrics_of(run(*arguments, *EXTRACTOR[:1], "spatial")) != {"frechet": pool3["frechet"]}
    with pytest.raises(ValueError, match="come with 'inception', not with inception-spatial"):
        run(*arguments, "--metrics", "inception_score", *EXTRACTOR[:1], "spatial")
    with pytest.raises(ValueError, match="no metric is asked of inception-spatial"):
        run(*arguments, "--metrics", "inception_score", *EXTRACTOR[:1], "pool3", "spatial")


def test_inception_score_is_of_the_logits_in_the_same_pass(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda _: FakeInception())
    arguments = ["--model", "base", *SMALL, "--metrics", "frechet"]
    report = run(*arguments, "inception_score", "--real", "real.npz", "--save-npz", "sample.npz")
    logits = 4 * project(torch.from_numpy(np.load("sample.npz")["arr_0"]).permute(0, 3, 1, 2))[:, :3]
    from trl_distreward.metrics.scores import inception_score

    assert metrics_of(report)["inception_score"] == pytest.approx(inception_score(logits, seed=0).mean, rel=1e-5)
    assert metrics_of(report)["frechet"] == metrics_of(run(*arguments, "--real", "real.npz"))["frechet"]
    for asked in ([], ["inception_score"]):  # in a folder that is kept, one after the other
        again = run(*arguments, *asked, "--real", "real.npz", "--work-dir", "work")
        assert metrics_of(again)["frechet"] == metrics_of(report)["frechet"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_what_one_does(folder):
    arguments = ["--model", folder / "base", "--real", folder / "real.npz", *SMALL]
    alone = run(*arguments)
    result = launch("-m", "trl_distreward.scripts.evaluate", *arguments, *EXTRACTOR, "--output", folder / "two.json")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((folder / "two.json").read_text()) == alone
