# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import hashlib
import io
import pickle
import socket
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from trl_distreward.metrics import weights
from trl_distreward.metrics.weights import find_weights, read_tensors


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A file behind a URL, its digest, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save({"a": torch.ones(2)}, path)
    return path, path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "home").rglob("*") if p.is_file() and p.suffix != ".lock")


def test_download_is_checked_and_kept(served, tmp_path):
    path, url, digest = served
    found = find_weights(url, digest)
    assert found == tmp_path / "home" / "hub" / "checkpoints" / "weights.pth"
    assert found.read_bytes() == path.read_bytes()
    path.unlink()
    assert find_weights(url, digest[:8]) == found  # from the cache


def test_wrong_file_is_neither_used_nor_kept(served, tmp_path):
    _, url, digest = served
    with pytest.raises(ValueError, match=f"not the file it should be .*{digest}.*put the file of sha256 00000000"):
        find_weights(url, "0" * 64)
    assert cached(tmp_path) == []


def test_cached_file_that_changed_is_refused(served, tmp_path):
    _, url, digest = served
    found = find_weights(url, digest)
    found.write_bytes(b"else")
    with pytest.raises(ValueError, match=f"{found} has sha256 .*, not {digest}: it is damaged"):
        find_weights(url, digest)


def test_offline_message_says_which_file_goes_where(served, tmp_path, monkeypatch):
    _, url, digest = served
    place = tmp_path / "home" / "hub" / "checkpoints" / "weights.pth"
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=f"HF_HUB_OFFLINE is set.*put the file of sha256 {digest} at {place}"):
        find_weights(url, digest)
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/weights.pth"
        with pytest.raises(ConnectionError, match=f"cannot be downloaded.*put the file of sha256 {digest} at {place}"):
            find_weights(url, digest)
    assert cached(tmp_path) == []


def test_sources_are_told_apart(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path / "hub"))
    assert find_weights("org/repo.x:sub/weights.pt") == tmp_path / "hub"
    find_weights("org/repo@v1.0:weights.pt")
    assert asked == [
        (("org/repo.x", "sub/weights.pt"), {"revision": None}),
        (("org/repo", "weights.pt"), {"revision": "v1.0"}),
    ]

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(weights, "hf_hub_download", offline)
    with pytest.raises(ConnectionError, match="no network.*`hf download org/repo weights.pt` puts it into the cache"):
        find_weights("org/repo:weights.pt")
    with pytest.raises(FileNotFoundError, match="no weights at 'nowhere.pth': give a file"):
        find_weights("nowhere.pth")
    with pytest.raises(ValueError, match="needs sha256="):
        find_weights("https://example.org/weights.pth")
    with pytest.raises(ValueError, match="sha256='67' must be 8 to 64"):
        find_weights("nowhere.pth", "67")


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.padding = [0, 3]
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.register_buffer("beta", torch.arange(3.0).view(1, 3).expand(2, 3))

    def forward(self, x):
        return self.layers(x) + self.padding[1]


def test_torchscript_archive_is_read_by_name_without_its_code(tmp_path):
    module = Scripted()
    torch.jit.script(module).save(str(tmp_path / "network.pt"))
    # the code is not even looked at
    with zipfile.ZipFile(tmp_path / "network.pt") as whole, zipfile.ZipFile(tmp_path / "bare.pt", "w") as bare:
        for name in whole.namelist():
            if "/code/" not in name:
                bare.writestr(name, whole.read(name))
    for name in ("network.pt", "bare.pt"):
        tensors = read_tensors(tmp_path / name)
        assert tensors.keys() == module.state_dict().keys()
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in tensors.items())


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_a_file_carries_is_run(tmp_path, archive):
    trap, path = tmp_path / "ran", tmp_path / "weights.pt"
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x/constants.pkl", b"")
            file.writestr("x/data.pkl", pickle.dumps(Malice(trap)))
    else:
        torch.save({"a": Malice(trap)}, path)
    with pytest.raises(ValueError, match="which no archive of weights needs|holds more than tensors"):
        read_tensors(path)
    assert not trap.exists()


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.pth holds more than tensors, or is damaged"):
        read_tensors(tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read_tensors(tmp_path / "a.safetensors")
    torch.save([torch.ones(2)], tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth holds a list, not a dictionary of tensors"):
        read_tensors(tmp_path / "b.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors")
    assert read_tensors(tmp_path / "c.safetensors")["a"].tolist() == [1, 1]
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    (tmp_path / "d.pt").write_bytes(buffer.getvalue())
    assert read_tensors(tmp_path / "d.pt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"nothing", "is a damaged TorchScript archive"), (pickle.dumps({}), "archive of a dict, not of a module")],
)
def test_archives_without_a_module_are_refused(tmp_path, content, message):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("x/constants.pkl", b"")
        file.writestr("x/data.pkl", content)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.pt")


def archive_of(path, tree, compression=zipfile.ZIP_STORED, **storages):
    """A TorchScript archive of a pickle written by hand."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/constants.pkl", b"")
        file.writestr("x/data.pkl", b"\x80\x02" + tree + b".")
        for name, content in storages.items():
            file.writestr(f"x/data/{name}", content)
    return path


NODE = b"c__torch__\nM\n)\x81"


def tensor_of(size, stride, storage="0"):
    """Instructions for a tensor of a storage of floats."""
    numbers = [b"(" + b"".join(f"I{n}\n".encode() for n in numbers) + b"t" for numbers in (size, stride)]
    identifier = f"(Vstorage\nctorch\nFloatStorage\nV{storage}\nVcpu\nI1\ntQ".encode()
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + b"I0\n" + numbers[0] + numbers[1] + b"I00\n}tR"


def with_attributes(**values):
    return NODE + b"}(" + b"".join(b"V" + name.encode() + b"\n" + value for name, value in values.items()) + b"ub"


def nested(times):
    tree = with_attributes(a=b"N")
    for _ in range(times):  # 2ⁿ paths through n nodes
        tree = NODE + b"}(Va\n" + tree + b"q\x01Vb\nh\x01ub"
    return tree


def test_hostile_archives_take_no_memory_and_leave_nothing_behind(tmp_path):
    path, four = tmp_path / "a.pt", {"0": bytes(4)}
    trees = {
        "memo of 2²⁹": b"Nr\xff\xff\xff\x1f0" + with_attributes(a=b"N"),
        "bytes that are not there": b"\x96" + (3 * 10**8).to_bytes(8, "little") + b"x",
        "repeated": with_attributes(a=tensor_of((1 << 14, 1 << 14), (0, 0))),
        "beyond": with_attributes(a=tensor_of((2,), (1,))),
        "cycle": NODE + b"q\x00}(Va\nh\x00ub",
        "paths": nested(60),
        "deep": b"".join([NODE + b"}(Va\n"] * 5000) + b"N" + b"ub" * 5000,
        "odd name": NODE + b"}(I5\n" + tensor_of((1,), (1,)) + b"ub",
        "short": with_attributes(a=tensor_of((1,), (1,), "1")),
    }
    for name, tree in trees.items():
        archive_of(path, tree, **four)
        tracemalloc.start()
        if name == "memo of 2²⁹":  # malformed in no way that matters: it must only take no memory
            assert read_tensors(path) == {}
        else:
            with pytest.raises(ValueError, match="is a damaged TorchScript archive"):
                read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 2e8, name
        tracemalloc.stop()
    archive_of(path, b"c__torch__\nM\n(N}(Vmarked\nI1\nutb0" + with_attributes(a=tensor_of((1,), (1,))), **four)
    assert read_tensors(path)["a"].tolist() == [0] and not hasattr(weights._Node, "marked")
    archive_of(path, with_attributes(a=tensor_of((1,), (1,))), zipfile.ZIP_DEFLATED, **four)
    with pytest.raises(ValueError, match="compressed, or claims more bytes than the file has"):
        read_tensors(path)


def test_a_module_that_is_held_twice_has_both_names(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3))
    module.add_module("again", module[0])
    torch.jit.script(module).save(str(tmp_path / "shared.pt"))
    assert read_tensors(tmp_path / "shared.pt").keys() == module.state_dict().keys()
