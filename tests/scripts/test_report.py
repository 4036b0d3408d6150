# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest

from tests.helpers import tiny_merge_trainer, tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP
from trl_distreward import LogSamplesCallback
from trl_distreward.scripts import report

TOKEN = "hf_" + "aBcD" * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output folder of three updates, with evaluations and samples."""
    folder = tmp_path_factory.mktemp("runs") / "digits & <b>more"
    settings = {"save_strategy": "steps", "save_steps": 2, **EVALUATE_EVERY_STEP}
    trainer = tiny_trainer(folder, max_steps=3, hub_token=TOKEN, **settings)
    trainer.add_callback(LogSamplesCallback(trainer))
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges") / "merged"
    trainer = tiny_merge_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.compare()
    trainer.save_model()
    return folder


class Reader(HTMLParser):
    """Sections, text, and addresses that a page would load."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data):
        self.text.append(data.strip())


def rows(page, title):
    """Cells of the first table after a heading."""
    found = page.partition(f"<h2>{title}</h2>")[2]
    found = found[: found.index("</table>")]
    lines = re.findall(r"<tr>(.*?)</tr>", found, flags=re.DOTALL)
    return [[cell.strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)] for line in lines]


def test_page_shows_the_run_and_loads_nothing(run):
    page = report.render_report(run)
    read = Reader(page)
    assert not {"script", "link", "iframe", "object", "b"} & set(read.tags)  # the name of the folder is escaped
    assert read.loads and all(value.startswith(("data:", "#")) for value in read.loads)
    assert "@import" not in page and TOKEN not in page
    text = " ".join(read.text).replace("\n", " ")
    assert "digits & <b>more" in text and "update 3 of" in text
    for title in ("Evaluation", "Samples", "Training", "Cost", "Settings that differ from the defaults"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/webp;base64,") == 4  # before and after each update
    assert page.count('<svg role="img"') > 6 and "currentColor" in page and report.INK not in page


def test_evaluations_are_those_of_the_run(run):
    values = [e["values"] for e in json.loads((run / "run.json").read_text())["evaluations"]]
    head, *found = rows(report.render_report(run), "Evaluation")
    assert head == ["metric", "sampler", "first", "last", "change"]
    (ode,) = [row for row in found if row[1] == "ODE"]
    first, last = (each["ode_distance_features"] for each in (values[0], values[-1]))
    change = f"{100 * (last - first) / first:+.1f} %"
    assert ode == ["distance_features", "ODE", f"{first:.4g}", f"{last:.4g}", change]


def test_costs_and_changed_settings_are_listed(run):
    page, record = report.render_report(run), json.loads((run / "run.json").read_text())
    costs = {row[0]: row[1:] for row in rows(page, "Cost")}
    assert int(costs["rollout"][2]) == record["images"]["rollout"] and costs["together"][1] == "100.0%"
    changed = {row[0]: row[1:] for row in rows(page, "Settings that differ from the defaults")}
    assert changed["reference_set_size"][0] == "24" and "num_iterations" not in changed


def test_interrupted_run_is_shown_by_its_newest_checkpoint(run, tmp_path):
    folder = tmp_path / "interrupted"
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    page = report.render_report(folder)
    assert "A run, update 2" in page and "<h2>Evaluation</h2>" in page
    for title in ("Samples", "Cost"):
        assert f"<h2>{title}</h2>" not in page


def test_merge_shows_coefficients_and_comparison(merged):
    page, record = report.render_report(merged), json.loads((merged / "run.json").read_text())
    coefficients = rows(page, "Coefficients")
    assert [row[1] for row in coefficients[1:]] == [f"{value:,.4g}" for value in record["coefficients"]["all"]]
    assert [row[0] for row in rows(page, "Comparison")] == ["merge", "last", "uniform", "start", "learnt"]


def test_names_from_outside_are_shown_as_they_are(run, tmp_path):
    folder, nasty = tmp_path / "run", "<script>alert(1)</script>"
    shutil.copytree(run, folder)
    record, state = (json.loads((folder / name).read_text()) for name in ("run.json", "trainer_state.json"))
    record["rewards"], record["model"]["source"], record["trainer"] = {nasty: 1.0}, nasty, nasty
    record["evaluations"][0]["values"] |= {f"ode_{nasty}": 1.0, f"sde_{nasty}": 1.0}
    record["seconds"][nasty] = 1.0
    state["log_history"].append({"step": 3, f"rewards/{nasty}/mean": 1.0, f'x" onload="{nasty}': 2.0})
    for name, content in (("run.json", record), ("trainer_state.json", state)):
        (folder / name).write_text(json.dumps(content))
    settings = json.loads((folder / "training_args.json").read_text())
    (folder / "training_args.json").write_text(json.dumps({**settings, "noise_schedule": nasty}))
    (folder / "samples" / "step-last.png").write_bytes(b"no grid")
    os.mkfifo(folder / "samples" / "step-9.png")
    read = Reader(report.render_report(folder))
    assert not {"script", "iframe"} & set(read.tags) and "".join(read.text).count(nasty) >= 7


def test_command_writes_one_file(run, tmp_path, capsys):
    report.main([str(run), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text() == report.render_report(run)
    assert "page.html: 0." in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="has no trainer_state.json and no checkpoint"):
        report.main([str(tmp_path)])
