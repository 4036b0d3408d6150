# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools from a stand-in for the Hub: pinned to commits, compared before they are downloaded, whole or refused."""

import hashlib
import json
import logging
import traceback
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import save

from tests.hub_server import HubServer, connect
from trl_distreward import CheckpointPool, hub

TOKEN, OTHER = "hf_secretsecretsecret", "hf_anotherone"
FILE = "diffusion_pytorch_model.safetensors"


def weights(seed, size=64):
    generator = torch.Generator().manual_seed(seed)
    return save({"weight": torch.randn(size, size, generator=generator), "gain": torch.tensor(float(seed))})


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    connect(monkeypatch, server, tmp_path / "home")
    server.add("org/a", {FILE: weights(0), "README.md": b"x"})
    server.add("org/b", {f"unet/{FILE}": weights(1), "model_index.json": b"{}"})
    yield server
    server.shutdown()
    huggingface_hub.close_session()


def downloaded(server):
    return sum(count for verb, path, count in server.served if path == FILE and verb == "GET")


def test_pool_is_pinned_to_commits(server):
    first = server.branches["org/a"]["main"]
    main = server.add("org/a", {FILE: weights(5)})
    huggingface_hub.HfApi().create_branch("org/a", branch="tuned")
    tuned = server.add("org/a", {f"sub/dir/{FILE}": weights(6)}, branch="tuned")
    pool = CheckpointPool(
        ["org/a", f"org/a@{first}", "org/a@tuned:sub/dir", f"org/a@tuned:sub/dir/{FILE}", "org/b", "org/b:unet"]
    )
    assert [member.revision for member in pool.members[:4]] == [main, first, tuned, tuned]
    assert [member.subfolder for member in pool.members] == ["", "", "sub/dir", "sub/dir", "", "unet"]
    assert [dict(pool.merged(row))["gain"].item() for row in torch.eye(6)] == [5.0, 0.0, 6.0, 6.0, 1.0, 1.0]
    assert pool.describe()["members"][2] == {
        "repo_id": "org/a",
        "revision": tuned,
        "subfolder": "sub/dir",
        "files": {FILE: hashlib.sha256(weights(6)).hexdigest()},
    }


def test_branch_that_moves_while_it_is_read_is_refused(server, monkeypatch):
    download = huggingface_hub.hf_hub_download

    def move_then_download(*args, **kwargs):
        server.add("org/a", {FILE: weights(5)})
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", move_then_download)
    with pytest.raises(ConnectionError, match="reading org/a: .*try again"):
        CheckpointPool(["org/a"])


def test_every_file_is_downloaded_once(server):
    data = weights(7, size=256)
    server.add("org/c", {FILE: data})
    CheckpointPool(["org/c", "org/c@main"])
    headers = 2 * 100_001  # of at most 100 kB, before the weights
    assert downloaded(server) <= len(data) + headers
    server.served.clear()
    CheckpointPool(["org/c"])
    assert downloaded(server) == 0


def test_odd_checkpoint_is_found_before_weights_are_downloaded(server):
    server.add("org/odd", {FILE: weights(3, size=300)})
    with pytest.raises(ValueError, match=r"org/odd is not like.*weight is \(\(300, 300\), 'F32'\) in it"):
        CheckpointPool(["org/a", "org/odd", "org/b"])
    assert downloaded(server) <= 2 * 100_001


def test_shards_are_read_from_the_hub(server):
    whole = {"weight": torch.ones(64, 64), "gain": torch.tensor(4.0)}
    names = {key: f"model-0000{i}-of-00002.safetensors" for i, key in enumerate(whole, 1)}
    files = {names[key]: save({key: value}) for key, value in whole.items()}
    index = json.dumps({"weight_map": names}).encode()
    server.add("org/shards", {**files, "model.safetensors.index.json": index})
    pool = CheckpointPool(["org/a", "org/shards"])
    merged = dict(pool.merged(torch.tensor([0.0, 1.0])))
    assert all(torch.equal(merged[key], value) for key, value in whole.items())
    assert [len(member.files) for member in pool.members] == [1, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/absent", "no repository org/absent"),
        ("org/a@absent", "no such branch, tag or commit"),
        ("org/b:absent", r"org/b:absent is not in org/b at .*, but in \['unet'\]"),
        ("org/a:../../b", "is not in org/a"),
        ("org/a:README.md", "is not in org/a"),
        ("org/a/b/c", "no file or folder"),
        ("org/pickle", "weights_only=True"),
        ("org/text", "is not a safetensors file"),
    ],
)
def test_missing_checkpoints_are_explained(server, source, message):
    server.add("org/pickle", {"model.pth": b"x"})
    server.add("org/text", {"model.safetensors": b"not a model, in truth" * 10})
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        CheckpointPool(["org/a", source])


@pytest.mark.parametrize(
    ("source", "token", "fault", "kind"),
    [
        ("org/a", OTHER, None, PermissionError),  # a gated repository
        ("org/b", OTHER, None, FileNotFoundError),  # a private one
        *(("org/a", TOKEN, fault, OSError) for fault in (403, 500, 404)),
    ],
)
def test_errors_do_not_tell_the_token(server, caplog, capfd, source, token, fault, kind):
    caplog.set_level(logging.DEBUG)
    server.gated["org/a"] = server.private["org/b"] = TOKEN
    if fault:  # a server that repeats the token in its answer
        server.misbehave("GET", source, fault, times=2 * hub.ATTEMPTS)
    with pytest.raises(kind) as caught:
        CheckpointPool([source], token=token)
    printed = capfd.readouterr()
    for text in (*traceback.format_exception(caught.value), caplog.text, printed.out, printed.err):
        assert token not in text


def test_token_goes_to_the_server_and_nowhere_else(server, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.gated["org/a"] = server.private["org/b"] = TOKEN
    pool = CheckpointPool(["org/a", "org/b"], token=TOKEN)
    pool.save_merged(tmp_path / "merged.safetensors", torch.ones(2))
    kept = repr(vars(pool)) + repr(pool.members) + json.dumps(pool.describe())
    assert TOKEN not in kept + caplog.text + "".join(capfd.readouterr())
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "cut"])
@pytest.mark.parametrize("part", ["api/models/org/a", "resolve"])
def test_short_failures_are_retried(server, fault, part):
    server.misbehave("GET", part, fault, times=2)
    if part == "resolve" and isinstance(fault, int):
        server.misbehave("HEAD", part, fault, times=2)
    pool = CheckpointPool(["org/a"])
    assert not server.faults
    assert pool.describe()["members"][0]["files"][FILE] == hashlib.sha256(weights(0)).hexdigest()


@pytest.mark.parametrize(
    ("fault", "reason"), [(500, "HTTP 500"), ("reset", "RemoteProtocolError"), ("silence", "ReadTimeout")]
)
def test_long_failures_are_explained_after_bounded_attempts(server, fault, reason):
    server.misbehave("GET", "api/models/org/a", fault, times=100)
    with pytest.raises(ConnectionError, match=f"reading org/a: .*{hub.ATTEMPTS} attempts, lastly with {reason}"):
        CheckpointPool(["org/a"])
    assert len(server.faults) == 100 - hub.ATTEMPTS


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_half_a_file_is_never_used(server, tmp_path, fault):
    server.add("org/c", {FILE: weights(7, size=300)})
    server.misbehave("GET", "org/c/resolve", fault, times=100)
    with pytest.raises((OSError, ValueError)):
        CheckpointPool(["org/c"])
    cached = [path for path in (tmp_path / "home").rglob(FILE) if path.stat().st_size]
    assert not cached
    server.faults.clear()
    files = CheckpointPool(["org/c"]).describe()["members"][0]["files"]
    assert files[FILE] == hashlib.sha256(weights(7, size=300)).hexdigest()


def test_cache_serves_without_the_network(server, monkeypatch):
    online = CheckpointPool(["org/a@main", "org/b:unet"])
    server.misbehave("GET", "", 500, times=100)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert CheckpointPool(["org/a@main", "org/b:unet"]).describe() == online.describe()
    assert len(CheckpointPool([f"org/a@{online.members[0].revision}"])) == 1 and len(server.faults) == 100
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        CheckpointPool(["org/c"])


def test_token_does_not_follow_to_another_host(server):
    """Weights are with a storage provider, which must not see the token."""
    elsewhere = HubServer()
    elsewhere.add("org/a", {FILE: weights(0)})
    elsewhere.private["org/a"] = ""  # refuses requests with a token
    server.private["org/a"], server.storage = TOKEN, elsewhere.url
    assert len(CheckpointPool(["org/a"], token=TOKEN)) == 1
    assert [verb for verb, path, _ in elsewhere.served if path == FILE] == ["GET", "GET"]
    elsewhere.shutdown()


@pytest.mark.parametrize(
    ("error", "kind", "retried"),
    [(TimeoutError(), ConnectionError, True), (OSError(28, "full"), OSError, False), (RuntimeError(), None, False)],
)
def test_only_failures_that_may_pass_are_retried_and_waits_grow(monkeypatch, error, kind, retried):
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)

    def fail():
        raise error

    with pytest.raises(kind or RuntimeError):
        hub.with_retries(fail, "reading", "org/a")
    assert waits == [hub.BACKOFF * 2**attempt for attempt in range(hub.ATTEMPTS - 1) if retried]


@pytest.mark.parametrize(
    ("status", "kind", "calls"), [(403, PermissionError, 1), (400, OSError, 1), (503, ConnectionError, hub.ATTEMPTS)]
)
def test_refused_upload_is_explained_without_its_signed_address(monkeypatch, status, kind, calls):
    """huggingface_hub raises a RuntimeError, whose cause has the server's answer and the address."""
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    address, made = "https://storage.example/put?X-Amz-Signature=0123", []

    def upload():
        made.append(address)
        error = HTTPError(f"HTTP {status} for {address}")
        error.response = SimpleNamespace(status_code=status)
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error

    with pytest.raises(kind, match=f"^pushing to org/a: .*HTTP {status}") as caught:
        hub.with_retries(upload, "pushing to org/a", "org/a")
    assert type(caught.value) is kind and len(made) == calls
    assert "Signature" not in "".join(traceback.format_exception(caught.value))
