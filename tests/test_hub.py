# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Push to and load from a stand-in for the Hub."""

import json
import traceback

import pytest
from safetensors.torch import load as load_safetensors

from tests.hub_server import HubServer, connect, run_code
from trl_distreward.hub import ATTEMPTS, push_folder

TOKEN = "hf_secretsecretsecret"
RUN = """
import sys
from pathlib import Path
import trl_distreward.hub
trl_distreward.hub.BACKOFF = 0.0
from tests.helpers import tiny_merge_trainer, tiny_trainer
kind, folder, token, strategy = sys.argv[1:]
make = tiny_merge_trainer if kind == "merge" else tiny_trainer
trainer = make(Path(folder), max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True,
               hub_model_id="org/tiny", hub_token=token, hub_always_push=True, hub_strategy=strategy)
trainer.train()
Path(folder, "real_statistics.safetensors").write_bytes(b"of real data")
Path(folder, "report.html").write_text("names folders")
Path(folder, "runs").mkdir()
Path(folder, "runs", "events.out.tfevents.1.host.2.0").write_text("names the host")
trainer.push_to_hub()
"""
LOAD = """
import sys
import torch
from trl_distreward import load_pipeline
pipelines = [load_pipeline("org/tiny"), load_pipeline(sys.argv[1])]
a, b = (dict(p.transformer.named_parameters()) for p in pipelines)
assert all(torch.equal(a[name], b[name]) for name in a)
first = load_pipeline("org/tiny", revision=sys.argv[2]).transformer
assert any(not torch.equal(p, a[name]) for name, p in first.named_parameters())
print("loaded")
"""


@pytest.fixture
def hub(tmp_path):
    server = HubServer()
    yield server
    server.shutdown()


def pushed(hub, folder, strategy, kind="train"):
    """Runs a training that pushes; neither it nor its files tell the token."""
    result = run_code(hub, folder / "home", RUN, kind, folder / "run", TOKEN, strategy)
    assert TOKEN not in result.stdout + result.stderr
    assert all(TOKEN.encode() not in data for _, files, _ in hub.repos["org/tiny"] for data in files.values())
    assert all(TOKEN.encode() not in path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file())
    return result


def weight(files):
    tensors = load_safetensors(files["transformer/diffusion_pytorch_model.safetensors"])
    return tensors["blocks.0.attn.qkv.weight"]


def test_every_save_pushes_weights_that_load_back(hub, tmp_path):
    result = pushed(hub, tmp_path, "every_save")
    assert result.returncode == 0, result.stderr[-3000:]
    commits = hub.repos["org/tiny"]
    during = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [message for _, _, message in commits] == [*during, "End of training"]
    assert not weight(commits[0][1]).equal(weight(commits[1][1]))
    assert weight(commits[1][1]).equal(weight(commits[2][1]))
    names = set(commits[-1][1])
    assert {"model_index.json", "transformer/config.json", "README.md"} <= names
    assert not any(name.startswith(("optimizer", "rng_state", "scheduler", "diffusion", "_")) for name in names)
    assert not {"run.json", "report.html", "real_statistics.safetensors"} & names and "host" not in str(names)
    result = run_code(hub, tmp_path / "home", LOAD, tmp_path / "run", commits[0][0])
    assert result.returncode == 0 and "loaded" in result.stdout, result.stderr[-3000:]


def test_checkpoint_strategy_pushes_what_resuming_needs(hub, tmp_path):
    result = pushed(hub, tmp_path, "checkpoint")
    assert result.returncode == 0, result.stderr[-3000:]
    names = set(hub.repos["org/tiny"][-1][1])
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/diffusion_state.pt"} <= names


def test_failed_push_is_logged_and_made_up_for_by_the_last(hub, tmp_path):
    hub.misbehave("POST", "/commit/", 500, times=ATTEMPTS)  # the first of three pushes
    result = pushed(hub, tmp_path, "every_save")
    assert result.returncode == 0 and "push during training failed" in result.stderr, result.stderr[-3000:]
    assert hub.repos["org/tiny"][-1][2] == "End of training"


@pytest.mark.parametrize("fault", [500, "reset", "commit and reset"])
def test_interrupted_push_becomes_one_commit(hub, tmp_path, monkeypatch, fault):
    connect(monkeypatch, hub, tmp_path / "home")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    hub.add("org/model", {"a.txt": b"before"})
    hub.misbehave("POST", "/commit/", fault, times=2 if fault != "commit and reset" else 1)
    pushed = push_folder(folder, "org/model", token=TOKEN)
    assert len(hub.repos["org/model"]) == 2 and not hub.faults
    assert pushed.oid == hub.branches["org/model"]["main"]
    assert hub.revision("org/model", "main")[1] == {"a.txt": b"one", "b.txt": b"two"}


@pytest.mark.parametrize("fault", [500, 403, "reset"])
def test_failed_push_leaves_the_branch(hub, tmp_path, monkeypatch, fault):
    connect(monkeypatch, hub, tmp_path / "home")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("one")
    hub.add("org/model", {"a.txt": b"before"})
    hub.misbehave("POST", "/commit/", fault, times=100)
    with pytest.raises(PermissionError if fault == 403 else ConnectionError, match="pushing to org/model") as caught:
        push_folder(tmp_path / "model", "org/model", token=TOKEN)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert len(hub.faults) == 100 - (1 if fault == 403 else ATTEMPTS)
    assert hub.revision("org/model", "main")[1] == {"a.txt": b"before"}


def test_failed_last_push_fails_the_run(hub, tmp_path):
    hub.misbehave("POST", "/commit/", 500, times=100)
    result = pushed(hub, tmp_path, "end")
    assert result.returncode != 0 and "500" in result.stderr


def test_merged_model_is_pushed_with_its_coefficients(hub, tmp_path):
    result = pushed(hub, tmp_path, "end", kind="merge")
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.repos["org/tiny"][-1][1]
    coefficients = json.loads(files["coefficients.json"])["coefficients"]["all"]
    assert len(coefficients) == 4 and "transformer/diffusion_pytorch_model.safetensors" in files
    assert f"{coefficients[3]:.4f}" in files["README.md"].decode()
