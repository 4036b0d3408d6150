# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools from the Hub, against a stand-in on loopback: pinned, checked before they are downloaded, whole or refused."""

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
from trl_distreward.merging import hub_source

TOKEN, OTHER = "hf_secretsecretsecret", "hf_anotherone"
FILE = "diffusion_pytorch_model.safetensors"


def weights(seed, size=64, **tensors):
    generator = torch.Generator().manual_seed(seed)
    return save({"weight": torch.randn(size, size, generator=generator), "gain": torch.tensor(float(seed)), **tensors})


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    connect(monkeypatch, server, tmp_path / "home")
    server.add("org/a", {FILE: weights(0), "README.md": b"x"})
    server.add("org/b", {f"unet/{FILE}": weights(1), "model_index.json": b"{}"})
    yield server
    server.shutdown()
    huggingface_hub.close_session()


def bytes_of(server, repo_path, method="GET"):
    return sum(count for verb, path, count in server.served if path == repo_path and verb == method)


def test_pool_is_pinned_to_commits(server):
    first = server.branches["org/a"]["main"]
    server.add("org/a", {FILE: weights(5)}, branch="main")
    huggingface_hub.HfApi().create_branch("org/a", branch="tuned")
    tuned = server.add("org/a", {f"sub/dir/{FILE}": weights(6)}, branch="tuned")
    pool = CheckpointPool(
        ["org/a", f"org/a@{first}", "org/a@tuned:sub/dir", f"org/a@tuned:sub/dir/{FILE}", "org/b", "org/b:unet"]
    )
    main = server.branches["org/a"]["main"]
    assert [member.revision for member in pool.members[:4]] == [main, first, tuned, tuned]
    assert [member.subfolder for member in pool.members] == ["", "", "sub/dir", "sub/dir", "", "unet"]
    gains = [dict(pool.merged(row))["gain"].item() for row in torch.eye(6)]
    assert gains == [5.0, 0.0, 6.0, 6.0, 1.0, 1.0]
    described = pool.describe()["members"][2]
    assert described == {
        "repo_id": "org/a",
        "revision": tuned,
        "subfolder": "sub/dir",
        "files": {FILE: hashlib.sha256(weights(6)).hexdigest()},
    }


def test_every_file_is_downloaded_once(server):
    data = weights(7, size=256)
    server.add("org/c", {FILE: data})
    CheckpointPool(["org/c", "org/c@main"])
    assert bytes_of(server, FILE) <= len(data) + 2 * hub_source._FIRST_BYTES
    server.served.clear()
    CheckpointPool(["org/c"])
    assert bytes_of(server, FILE) == 0  # neither header nor weights once they are in the cache


@pytest.mark.parametrize("ranges", [True, False])
def test_odd_one_out_is_found_from_headers(server, ranges):
    server.ranges = ranges
    server.add("org/odd", {FILE: weights(3, size=300)})
    with pytest.raises(ValueError, match=r"org/odd is not like.*weight is \(300, 300\) float32 in it, but \(64, 64\)"):
        CheckpointPool(["org/a", "org/odd", "org/b"])
    if ranges:  # the header of the large one came, its weights did not
        assert bytes_of(server, FILE) <= 2 * hub_source._FIRST_BYTES


def test_server_without_ranges_sends_each_file_once(server):
    server.ranges = False
    data = weights(7, size=700)
    server.add("org/c", {FILE: data})
    pool = CheckpointPool(["org/c"])
    # what was on its way when the answer to the range turned out to be all of it is not counted by the client
    assert sum(1 for verb, path, _ in server.served if path == FILE and verb == "GET") == 2
    assert dict(pool.merged(torch.ones(1)))["gain"].item() == 7.0


def test_long_headers_come_in_two_parts(server, monkeypatch):
    monkeypatch.setattr(hub_source, "_FIRST_BYTES", 16)
    assert len(CheckpointPool(["org/a"])) == 1
    parts = [count for verb, path, count in server.served if path == FILE and verb == "GET"]
    assert parts[0] == 16 and len(parts) == 3


def test_shards_on_the_hub(server):
    shards = {"model-00001-of-00002.safetensors": "weight", "model-00002-of-00002.safetensors": "gain"}
    whole = {"weight": torch.ones(64, 64), "gain": torch.tensor(4.0)}
    files = {name: save({key: whole[key]}) for name, key in shards.items()}
    index = json.dumps({"weight_map": {key: name for name, key in shards.items()}}).encode()
    server.add("org/shards", {**files, "model.safetensors.index.json": index})
    pool = CheckpointPool(["org/a", "org/shards"])
    merged = dict(pool.merged(torch.tensor([0.0, 1.0])))
    assert all(torch.equal(merged[key], value) for key, value in whole.items())
    assert [len(member.files) for member in pool.members] == [1, 2]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("org/absent", FileNotFoundError, "no repository org/absent"),
        ("org/a@absent", FileNotFoundError, "no such branch, tag or commit"),
        ("org/b:absent", FileNotFoundError, r"org/b:absent is not in org/b at commit .* there are \['unet'\]"),
        ("org/a:absent.safetensors", FileNotFoundError, "is not in org/a"),
        ("org/a:../../b", ValueError, "leaves the repository"),
        ("org/a:sub/../..", ValueError, "leaves the repository"),
        ("org/a@../../../x", ValueError, "leaves the repository"),
        ("org/a:README.md", FileNotFoundError, "is not in org/a"),
        ("org/a@main:a b", FileNotFoundError, "no file or folder"),
        ("org/a/b/c", FileNotFoundError, "no file or folder"),
        ("org/pickle", FileNotFoundError, "weights_only=True"),
        ("org/pickle:model.pth", ValueError, "pickles"),
        ("org/text", ValueError, "header"),
    ],
)
def test_what_is_not_there_is_told(server, source, kind, message):
    server.add("org/pickle", {"model.pth": b"x"})
    server.add("org/text", {"model.safetensors": b"not a model, in truth" * 10})
    with pytest.raises(kind, match=message):
        CheckpointPool(["org/a", source])


def everything_written(tmp_path):
    return b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault", ["gated", "private", 403, 500, 404, "none"])
def test_token_goes_to_the_server_and_nowhere_else(server, tmp_path, caplog, capfd, fault):
    caplog.set_level(logging.DEBUG)
    server.gated["org/a"] = server.private["org/b"] = TOKEN
    asked = {"gated": ("org/a", PermissionError, "gated"), "private": ("org/b", FileNotFoundError, "private")}
    told = ""
    if fault in asked:
        source, kind, message = asked[fault]
        with pytest.raises(kind, match=message) as caught:
            CheckpointPool([source], token=OTHER)
        told = "".join(traceback.format_exception(caught.value))
    elif fault == "none":
        pool = CheckpointPool(["org/a", "org/b"], token=TOKEN)
        pool.save_merged(tmp_path / "merged.safetensors", torch.ones(2))
        told = repr(vars(pool)) + repr(pool.members) + json.dumps(pool.describe())
    else:  # a server that repeats the token in its answer
        server.misbehave("GET", "org/a", fault, times=2 * hub.ATTEMPTS)
        with pytest.raises(OSError) as caught:
            CheckpointPool(["org/a"], token=TOKEN)
        told = "".join(traceback.format_exception(caught.value))
    printed = capfd.readouterr()
    for text in (told, caplog.text, printed.out, printed.err):
        assert TOKEN not in text and OTHER not in text
    assert TOKEN.encode() not in everything_written(tmp_path)


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "silence", "cut"])
@pytest.mark.parametrize("part", ["api/models/org/a", "resolve"])
def test_a_bad_moment_is_outlasted(server, fault, part):
    server.misbehave("GET", part, fault, times=2)
    if part == "resolve" and isinstance(fault, int):
        server.misbehave("HEAD", part, fault, times=2)
    pool = CheckpointPool(["org/a"])
    assert not server.faults
    assert torch.equal(dict(pool.merged(torch.ones(1)))["gain"], torch.tensor(0.0))
    assert pool.describe()["members"][0]["files"][FILE] == hashlib.sha256(weights(0)).hexdigest()


@pytest.mark.parametrize(
    ("fault", "reason"), [(500, "HTTP 500"), ("reset", "RemoteProtocolError"), ("silence", "ReadTimeout")]
)
def test_a_bad_day_is_told_after_bounded_attempts(server, fault, reason):
    server.misbehave("GET", "api/models/org/a", fault, times=100)
    with pytest.raises(ConnectionError, match=f"reading org/a: .*several attempts, the last time with {reason}"):
        CheckpointPool(["org/a"])
    assert len(server.faults) == 100 - hub.ATTEMPTS


def test_half_a_file_is_never_used(server, tmp_path):
    data = weights(7, size=300)
    server.add("org/c", {FILE: data})
    server.ranges = False  # nothing can be resumed
    server.misbehave("GET", "org/c/resolve", "cut", times=100)
    with pytest.raises((ConnectionError, OSError)):
        CheckpointPool(["org/c"])
    cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size]
    assert not any("snapshots" in path.parts and path.name == FILE for path in cached)
    server.faults.clear()
    pool = CheckpointPool(["org/c"])
    assert pool.describe()["members"][0]["files"][FILE] == hashlib.sha256(data).hexdigest()


def test_file_shorter_than_announced_is_refused(server):
    data = weights(7, size=300)
    server.add("org/c", {FILE: data})
    server.ranges = False
    server.misbehave("GET", "org/c/resolve", "short", times=100)
    with pytest.raises(ConnectionError, match="downloading"):
        CheckpointPool(["org/c"])


def test_bytes_that_are_not_the_hubs_are_refused(server):
    pool = CheckpointPool(["org/a"])
    path = pool.members[0].files[0].path.resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # as a bad disk would, before the pool is opened again
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the Hub has"):
        CheckpointPool(["org/a"]).describe()


def test_cache_serves_without_the_network(server, tmp_path, monkeypatch):
    online = CheckpointPool(["org/a@main", "org/b:unet"])
    server.misbehave("GET", "", 500, times=100)
    offline = CheckpointPool(["org/a@main", "org/b:unet"], local_files_only=True)
    assert [member.revision for member in offline.members] == [member.revision for member in online.members]
    assert offline.describe() == online.describe() and len(server.faults) == 100
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(CheckpointPool([f"org/a@{online.members[0].revision}"])) == 1
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        CheckpointPool(["org/c"])


def test_token_does_not_follow_to_another_host(server, monkeypatch):
    """Weights lie with a storage provider, which must not see the token."""
    elsewhere = HubServer()
    elsewhere.add("org/a", {FILE: weights(0)})
    elsewhere.private["org/a"] = ""  # refuses whoever shows one
    server.private["org/a"], server.storage = TOKEN, elsewhere.url
    assert len(CheckpointPool(["org/a"], token=TOKEN)) == 1
    assert [verb for verb, path, _ in elsewhere.served if path == FILE] == ["GET", "GET"]
    elsewhere.shutdown()


def test_retries_wait_longer_each_time_and_never_for_what_will_not_change(monkeypatch):
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)

    def fail():
        raise TimeoutError

    with pytest.raises(ConnectionError, match="TimeoutError"):
        hub.with_retries(fail, "reading", "org/a")
    assert waits == [hub.BACKOFF * 2**attempt for attempt in range(hub.ATTEMPTS - 1)]

    def full():
        raise OSError(28, "No space left on device")

    waits.clear()
    with pytest.raises(OSError, match="No space left"):
        hub.with_retries(full, "reading", "org/a")
    assert not waits


@pytest.mark.parametrize(
    ("status", "kind", "calls"), [(403, PermissionError, 1), (400, OSError, 1), (503, ConnectionError, hub.ATTEMPTS)]
)
def test_refused_upload_of_a_large_file_is_explained_without_its_address(monkeypatch, status, kind, calls):
    """huggingface_hub hides the answer behind a RuntimeError, whose cause names an address with a signature."""
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

    def broken():
        raise RuntimeError("of the program")

    with pytest.raises(RuntimeError, match="of the program"):
        hub.with_retries(broken, "pushing to org/a", "org/a")
