# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import base64
import io
import json
import math
import os
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_merge_trainer, tiny_trainer
from trl_distreward import LogSamplesCallback
from trl_distreward.run_report import render_report, write_report
from trl_distreward.run_report.html import LARGEST_SIDE, picture
from trl_distreward.scripts import cli
from trl_distreward.scripts.report import make_parser

EVIL = '<script>document.title = "taken"</script><img src="https://example.com/x.png">'
TOKEN = "hf_" + "aBcD" * 8
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three updates, with evaluations before, in between and after, from two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "digits & <b>more</b>"
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny_trainer(
        folder, max_steps=3, log_reward_diagnostics=True, hub_token=TOKEN, run_name=f"named {TOKEN}", **settings
    )
    trainer.add_callback(LogSamplesCallback(trainer))
    for seed in (0, 1):
        trainer.evaluate(seed=seed)
    trainer.train()
    for seed in (0, 1):
        trainer.evaluate(seed=seed)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges") / "merged"
    trainer = tiny_merge_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(coefficients=[0.25] * 4)
    trainer.compare()
    return folder


class Reader(HTMLParser):
    """Checks that elements close, and keeps what a reader and a browser would see."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def rows_of(page, caption):
    """The cells of the table with a caption."""
    found = re.search(rf'<table aria-label="{caption}[^"]*">(.*?)</table>', page)
    rows = re.findall(r"<tr>(.*?)</tr>", found[1])
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_page_shows_the_run_and_asks_for_nothing(run):
    page = render_report(run)
    read = Reader(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(read.tags)
    loaded = [value for _, name, value in read.attributes if name in ("src", "href", "srcset", "action")]
    assert loaded and all(value.startswith(("data:", "#")) for value in loaded)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    text = " ".join(read.text)
    assert "digits & <b>more</b>" in text and "b" not in read.tags  # the folder's name as it is, escaped
    for title in ("Evaluation", "Samples", "Reward", "Updates", "Cost", "Configuration", "Versions"):
        assert f"#{title.lower()}" in loaded
    assert all(value for tag, name, value in read.attributes if tag == "img" and name == "alt")
    assert "Share of the spread that is noise" in text and "Drift from the reference set" in text
    assert "log_reward_diagnostics=True" not in text


def test_first_best_and_last_evaluations_are_the_runs(run):
    record = json.loads((run / "run.json").read_text())
    own = [e for e in record["evaluations"] if e["seed"] == 0]
    assert [e["step"] for e in own] == [0, 2, 3, 3] and [e["num_images"] for e in own] == [0, 48, 60, 60]
    values = [e["values"]["ode_distance_features"] for e in own]
    head, *rows = rows_of(render_report(run), "Evaluations of 24 images")
    assert head == ["metric", "sampler", "first", "best", "last", "change"]
    (row,) = [row for row in rows if row[1] == "ODE"]
    best = min(range(3), key=values.__getitem__)
    assert row[2] == f"{values[0]:.4g} (update 0)" and row[4] == f"{values[-1]:.4g} (update 3)"
    assert row[3] == f"{values[best]:.4g} (update {(0, 2, 3)[best]})"
    assert row[5].startswith(f"{100 * (values[-1] / values[0] - 1):+.1f} %".replace("-", "−"))
    assert row[5].endswith("better" if values[-1] < values[0] else "worse")
    seeds = rows_of(render_report(run), "Mean and standard deviation over noise of seeds 0, 1")
    first = [e["values"]["ode_distance_features"] for e in record["evaluations"] if e["step"] == 0]
    (spread,) = [row for row in seeds if row[1] == "ODE"]
    assert spread[2].startswith(f"{np.mean(first):.4g} ± ")


def test_grids_are_those_of_the_first_and_the_last_update(run):
    page = render_report(run)
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    steps = [int(path.stem.split("-")[1]) for path in (run / "samples").iterdir()]
    assert sorted(steps) == [0, 2, 3]  # the end as well, which is at no multiple of two
    for data, step in zip(shown, (0, 3, 2), strict=True):
        grid = np.asarray(Image.open(run / "samples" / f"step-{step}.png"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), grid)
    assert "24 images, ODE, 5 steps, noise of seed 0." in page


def test_cost_adds_up(run):
    record = json.loads((run / "run.json").read_text())
    assert set(record["seconds"]) == {
        "rollout", "reward", "training", "refresh", "evaluation", "samples", "checkpoints"
    }  # fmt: skip
    assert sum(record["seconds"].values()) <= record["total_seconds"]
    assert record["images"] == {"refresh": 24, "rollout": 36, "evaluation": 24 * 2 * 6, "samples": 3 * 24}
    assert record["num_images"] == 60
    shares = [
        float(share.split()[0]) for share in re.findall(r"<td class=\"num\">([\d.]+ %)</td>", render_report(run))
    ]
    assert shares[-1] == 100 and sum(shares[:-1]) == pytest.approx(100, abs=0.5)


def test_what_differs_from_the_defaults_is_on_top(run):
    rows = rows_of(render_report(run), "What differs from the defaults")
    changed = {row[0]: row[1:] for row in rows[1:]}
    assert changed["reference_set_size"] == ["24", "5000", "the reward"]
    assert changed["num_inference_steps_eval"] == ["[5]", "[250]", "evaluation"]
    assert not {"epsilon", "seed", "output_dir", "hub_token", "weight_decay"} & set(changed)
    assert "All settings that control the update" in render_report(run)


def test_tokens_are_nowhere(run):
    written = [path for path in run.rglob("*") if path.suffix in (".json", ".md", ".png") and path.parent == run]
    assert run / "run.json" in written
    assert TOKEN not in render_report(run) and all(TOKEN not in p.read_text() for p in [run / "run.json"])
    assert "named hf_***" in render_report(run)


def test_names_in_a_record_are_harmless(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["model"]["source"] = record["device"] = record["trainer"] = EVIL
    record["versions"][EVIL] = EVIL
    record["rewards"] = {EVIL: 1.0}
    record["skipped"] = [{"step": 1, "reason": EVIL}]
    record["config"]["values"]["noise_schedule"] = record["config"]["defaults"]["noise_schedule"] = EVIL
    for entry in record["log_history"]:
        entry[EVIL] = entry[f"rewards/{EVIL}/mean"] = entry[f"reference_distance/{EVIL}"] = 1.0
    for evaluation in record["evaluations"]:
        evaluation["values"][f"ode_{EVIL}"] = 1.0
    record["evaluations"].append({**record["evaluations"][0], "of": EVIL})
    (tmp_path / "run.json").write_text(json.dumps(record))
    page = render_report(tmp_path)
    plain = Reader(render_report(run))
    read = Reader(page)
    assert "script" not in read.tags and read.tags.count("img") == 0 < plain.tags.count("img")
    assert "".join(read.text).count(EVIL) >= 10
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_merge_shows_coefficients_and_what_it_is_compared_with(merged):
    page = render_report(merged)
    record = json.loads((merged / "run.json").read_text())
    (learnt,) = record["coefficients"].values()
    text = " ".join(Reader(page).text)
    assert all(f"{value:.4g}" in page for value in learnt) and "step-3.safetensors" in text
    assert page.count('<rect class="bar"') == 4 and "Coefficients of checkpoints 1 to 4" in page
    rows = {row[0]: row[1] for row in rows_of(page, "Merges from the same noise")}
    assert list(rows)[1:] == ["last", "uniform", "start", "learnt"]
    before, after = (record["comparison"][name]["ode_distance_features"] for name in ("last", "uniform"))
    assert f"({100 * (after / before - 1):+.1f} %".replace("-", "−") in rows["uniform"]
    # the given coefficients are no point of the curve
    assert [e["step"] for e in record["evaluations"] if "of" not in e] == [3]
    (_, row) = rows_of(page, "Evaluations of 20 images")
    assert row[4] == f"{record['comparison']['learnt']['ode_distance_features']:.4g} (update 3)"
    assert "Evaluations of something else" in page and "[0.25, 0.25, 0.25, 0.25]" in page


def test_coefficients_by_block_are_shown_as_their_mean(tmp_path):
    trainer = tiny_merge_trainer(tmp_path / "run", granularity="per_block", max_steps=1)
    trainer.train()
    page = render_report(tmp_path / "run")
    groups = len(trainer.group_names)
    assert groups > 1 and f"mean over {groups} groups" in page and trainer.group_names[0] in page


def test_run_without_a_record_is_told_by_its_newest_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    page = render_report(tmp_path / "old")
    assert "There is no run.json" in page and "2 of 3 updates. It goes on still, or was stopped." in page
    assert "(update 2)" in page and "reference_set_size" in page and TOKEN not in page


def test_run_that_is_interrupted_has_a_report_and_goes_on_with_its_record(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.evaluate()
    step = trainer.training_step

    def fail(*args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.training_step = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "3 of 4 updates. It goes on still, or was stopped." in render_report(tmp_path)
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [e["step"] for e in record["evaluations"]] == [0, 1, 2, 3, 4]
    assert [e["num_images"] for e in record["evaluations"]] == [0, 36, 48, 60, 72] and record["num_images"] == 72
    assert record["images"]["rollout"] == 48 and "was stopped" not in render_report(tmp_path)


def test_evaluation_before_resuming_leaves_the_earlier_record(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    before = (tmp_path / "run.json").read_text()
    tiny_trainer(tmp_path).evaluate()
    assert (tmp_path / "run.json").read_text() == before


def test_grids_of_a_longer_run_before_are_not_this_runs(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copy(folder / "samples" / "step-0.png", folder / "samples" / "step-9.png")
    assert "update 9" in render_report(folder)  # written since: the record may be a little behind
    os.utime(folder / "samples" / "step-9.png", (0, 0))
    assert "update 9" not in render_report(folder) and "update 3" in render_report(folder)


def test_evaluations_from_other_noise_alone_are_shown(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    other = next(e for e in record["evaluations"] if e["seed"] == 1)
    (tmp_path / "run.json").write_text(json.dumps({**record, "evaluations": [other]}))
    page = render_report(tmp_path)
    assert "Nothing was evaluated" not in page and "ode_distance_features" in page
    (tmp_path / "run.json").write_text(json.dumps({**record, "evaluations": []}))
    assert "Nothing was evaluated" in render_report(tmp_path)


def test_shares_that_differ_by_rounding_are_told_in_a_line(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    shares = [sum([0.4] * 3) / 3, 0.4]  # of three updates, and of one
    assert shares[0] != shares[1]
    history = [{**entry, "advantage_kept": share} for entry, share in zip(record["log_history"], shares, strict=False)]
    (tmp_path / "run.json").write_text(json.dumps({**record, "log_history": history}))
    assert ": 0.4 throughout." in render_report(tmp_path)


def test_evaluations_that_are_not_finite_are_told_over_seeds_too(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    last = max(e["step"] for e in record["evaluations"])
    for evaluation in record["evaluations"]:
        if evaluation["step"] == last:
            evaluation["values"] = dict.fromkeys(evaluation["values"], math.nan)
    (tmp_path / "run.json").write_text(json.dumps(record))
    page = render_report(tmp_path)
    assert "Mean and standard deviation over noise of seeds" in page and ">not finite</td>" in page


def test_folders_that_are_no_run_are_refused(run, tmp_path):
    for folder, message in [
        (tmp_path / "none", "no folder .*none: name the output_dir of a run"),
        (tmp_path, "is not the output_dir of a run, which has a run.json or checkpoints, written from the first"),
        (run.parent, "it holds runs, name one of .*digits"),
        (run / "checkpoint-2", "it is a checkpoint; name .*digits"),
    ]:
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            render_report(folder)
    (tmp_path / "run.json").write_text('{"step": 1')
    with pytest.raises(ValueError, match="run.json is not JSON"):
        render_report(tmp_path)
    (tmp_path / "run.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match="it has no trainer, evaluations, log_history"):
        render_report(tmp_path)


def test_report_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "page.html"
    monkeypatch.setattr(sys, "argv", ["trl-distreward", "report", str(run), "--output", str(output)])
    cli.main()
    assert str(output) in capsys.readouterr().out and output.read_text(encoding="utf-8") == render_report(run)
    with pytest.raises(ValueError, match="is a folder: name a file"):
        write_report(run, tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(run, tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_large_grids_are_shown_smaller_and_broken_ones_named(run, tmp_path):
    Image.effect_noise((3000, 1500), 50).save(tmp_path / "large.png")
    shown = picture(tmp_path / "large.png", "update 1")
    data = base64.b64decode(re.search(r'src="data:image/jpeg;base64,([^"]*)"', shown)[1])
    assert Image.open(io.BytesIO(data)).size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert "Shown smaller than its 3000 x 1500 pixels." in shown
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    grid = tmp_path / "run" / "samples" / "step-3.png"
    whole = grid.read_bytes()
    header = bytearray(whole)
    header[16:20] = (2**30).to_bytes(4, "big")  # its width
    checked = bytearray(whole)
    checked[30] ^= 1  # a bit of the header's checksum
    for damaged in (b"cut short", bytes(header), bytes(checked), whole[: len(whole) // 2]):
        grid.write_bytes(damaged)
        assert "step-3.png cannot be shown" in render_report(tmp_path / "run")


def test_command_explains_itself():
    shown = make_parser().format_help()
    assert "RUN_DIR/report.html" in shown and "trl-distreward report merged --output merged.html" in shown
