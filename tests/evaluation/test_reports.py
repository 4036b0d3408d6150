# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import io
import json

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from trl_distreward.evaluation import reports


def report(model="base", images=50_000, norm=10.0, resize="tensorflow", count=10_000, said=(), **metrics):
    metrics = metrics or {"frechet": 8.3, "kid": 0.004, "kid_std": 0.0005, "recall": 0.57}
    schedule = {"num_steps": 250, "sampler": "sde", "noise_schedule": "sit", "solver": "euler", "sde_steps": None}
    real = {"path": "stats/imagenet.npz", "count": count, "mean_norm": norm}
    result = {"extractor": "inception", "resize": resize, "real": real, "metrics": metrics}
    settings = {"schedule": schedule, "guidance_scale": 1.0, "seed": 0}
    return {"model": model, "images": images, "settings": settings, "results": [result], **dict(said)}


def test_changes_are_in_percent_of_the_first_as_in_table_4():
    before = report(frechet=8.30, kid=0.004, recall=0.0, precision=0.60)
    changes = reports.compare_reports(before, report("tuned", frechet=5.77, kid=0.00186, recall=0.1, precision=0.6258))
    percent = {change.after.name: change.percent for change in changes}
    assert percent["FID"] == pytest.approx(-30.48, abs=0.01) and percent["KID"] == pytest.approx(-53.5)
    assert percent["precision"] == pytest.approx(4.3) and percent["recall"] is None
    markdown = reports.change_markdown(before, report("tuned"), changes)
    assert "| FID | inception, tensorflow | 8.3 | 5.77 | -30.5 % |" in markdown
    assert "| undefined |" in markdown and "| base | tuned | change |" in markdown


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (report(images=5_000), "of 50000 and 5000 images"),
        (report(norm=10.1), "different real data.*norms 10 and 10.1"),
        (
            report(resize="clean"),
            "no metric in common: .*frechet of inception, tensorflow.*frechet of inception, clean",
        ),
        (report(density=1.0), "no metric in common"),
        (report(count=9_999), "different real data, imagenet.npz, 10,000 images and imagenet.npz, 9,999 images"),
        (report(said={"image_resize": 256, "skip_corrupt": False}), "made with --resize None and 256"),
        (report(said={"image_resize": None, "skip_corrupt": True}), "made with --skip-corrupt False and True"),
    ],
)
def test_what_cannot_be_compared_is_not(other, message):
    with pytest.raises(ValueError, match=message):
        reports.compare_reports(report(said={"image_resize": None, "skip_corrupt": False}), other)
    assert reports.compare_reports(report(), report(count=None, said={"image_resize": 256}))  # what is not told


def test_tables_show_every_number_once():
    shown = io.StringIO()
    Console(width=120, file=shown).print(reports.report_table(report()))
    for table in (shown.getvalue(), reports.report_markdown(report())):
        assert "FID" in table and "0.00400 ± 0.00050" in table and "imagenet.npz, 10,000 images" in table
        assert "base: 50,000 images" in table and table.count("0.57") == 1
    settings = reports.report_markdown(report()).splitlines()[-1]
    assert "`sampler` sde" in settings and "solver" not in settings and "None" not in settings


def test_card_takes_results_and_keeps_the_rest(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: other}\n"
        "    dataset: {name: d, type: d}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n\n# mine\n\nMy text.\n"
    )
    reports.update_card(tmp_path, report(frechet=8.3))
    reports.update_card(tmp_path, report(frechet=5.77))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "My text." in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"accuracy", "frechet_inception"}
    assert results["frechet_inception"].metric_value == 5.77 and results["frechet_inception"].metric_name == "FID"
    assert results["frechet_inception"].metric_args["num_images"] == 50_000
    assert card.text.count("| FID |") == 1 and "5.77" in card.text
    with pytest.raises(FileNotFoundError, match="no folder .*fresh for a model card"):
        reports.update_card(tmp_path / "fresh", report())
    (tmp_path / "fresh").mkdir()
    reports.update_card(tmp_path / "fresh", report())
    fresh = ModelCard.load(tmp_path / "fresh" / "README.md")
    assert fresh.data.library_name == "diffusers" and len(fresh.data.eval_results) == 3


def test_what_is_no_report_is_refused(tmp_path):
    path = tmp_path / "report.json"
    for content in ("[1, 2]", json.dumps({"model": "x"}), "{", "\x00"):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a report"):
            reports.read_report(path)
