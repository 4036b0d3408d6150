# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of local checkpoints: the merge, the copied tensors, and the checkpoints that are refused."""

import hashlib
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import tiny_pipeline, tiny_sit, tiny_trainer
from trl_distreward import CheckpointPool
from trl_distreward.merging import pool as pool_module


class Small(nn.Module):
    """Two weights, a scalar gain, a floating buffer and a counter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.gain = nn.Parameter(torch.randn(()))
        self.register_buffer("frequencies", torch.linspace(0, 1, 4))
        self.register_buffer("count", torch.tensor(seed))


BUFFERS = ["frequencies", "count"]
NAMES = {name for name, _ in Small().named_parameters()}
pytestmark = pytest.mark.filterwarnings("ignore:.*differ between the checkpoints")


def write(folder, count=3, dtype=None, change=None):
    """Writes the weights of `count` networks; `change(index, state)` may alter them."""
    paths = []
    for index in range(count):
        state = {
            k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in Small(index).state_dict().items()
        }
        if change is not None:
            state = change(index, state) or state
        paths.append(folder / f"{index}.safetensors")
        save_file(state, paths[-1])
    return paths


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merge_is_the_weighted_sum(tmp_path, dtype):
    paths = write(tmp_path, dtype=dtype)
    weights = torch.tensor([-0.36, 1.39, -0.03], dtype=torch.float64)
    merged = dict(CheckpointPool(paths, buffers=BUFFERS).merged(weights))
    states = [load_file(path) for path in paths]
    assert list(merged) == sorted(states[0])
    for key in NAMES:
        expected = sum(weight * state[key].double() for weight, state in zip(weights, states, strict=True))
        assert merged[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [0, 2])
def test_one_checkpoint_alone_comes_out_bit_by_bit(tmp_path, index):
    def spoil(number, state):
        state["gain"] = torch.tensor(float("inf")) if number != index else torch.tensor(-0.0)

    paths = write(tmp_path, change=spoil)
    merged = dict(CheckpointPool(paths, buffers=BUFFERS).merged(torch.eye(3)[index]))
    state = load_file(paths[index])
    assert all(torch.equal(bits(merged[key]), bits(state[key])) for key in NAMES)


def test_buffers_and_integers_are_copied_from_the_last_checkpoint(tmp_path):
    def change(index, state):
        state["frequencies"] = state["frequencies"] + index

    paths, weights = write(tmp_path, change=change), torch.tensor([3.0, 4.0, 5.0])
    with pytest.warns(UserWarning, match=r"2 buffers .* e.g. count: .*2.safetensors"):
        pool = CheckpointPool(paths, buffers=[*BUFFERS, "unknown"])
    assert pool.copied == {*BUFFERS} and set(pool.weighted) == NAMES
    last, merged, network = load_file(paths[-1]), dict(pool.merged(weights)), Small(9)
    CheckpointPool(paths).merge_into(network, weights)  # a network knows its buffers
    for key in BUFFERS:
        assert torch.equal(merged[key], last[key]) and torch.equal(network.state_dict()[key], last[key])
    merged["count"].add_(1)
    assert torch.equal(dict(pool.merged(weights))["count"], last["count"])


def test_equal_buffers_give_no_warning(tmp_path):
    def change(index, state):
        state["count"] = torch.tensor(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CheckpointPool(write(tmp_path, change=change), buffers=BUFFERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_into_a_network_keeps_its_memory(tmp_path, dtype):
    pool = CheckpointPool(write(tmp_path), buffers=BUFFERS)
    network = Small(9).to(dtype)
    network.second.weight.data = network.second.weight.data.t().contiguous().t()
    addresses = {name: p.data_ptr() for name, p in network.named_parameters()}
    weights = torch.tensor([0.2, 0.3, 0.5])
    pool.merge_into(network, weights)
    for key, value in pool.merged(weights):
        assert torch.equal(network.state_dict()[key], value.to(network.state_dict()[key].dtype)), key
    assert addresses == {name: p.data_ptr() for name, p in network.named_parameters()}
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())


def test_groups_have_their_own_coefficients(tmp_path):
    pool = CheckpointPool(write(tmp_path), buffers=BUFFERS)
    rows = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]])
    groups = {key: int(key.startswith("second")) for key in pool.weighted}
    merged, alone = dict(pool.merged(rows, groups)), [dict(pool.merged(row)) for row in rows]
    assert all(torch.equal(merged[key], alone[groups[key]][key]) for key in groups)
    network = Small(9)
    pool.merge_into(network, rows, groups)
    assert all(torch.equal(network.state_dict()[key], merged[key]) for key in groups)
    with pytest.raises(KeyError, match="gain"):
        pool.merged(rows, {key: 0 for key in groups if key != "gain"})


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(1, 3), torch.ones(())])
def test_weights_of_another_shape_are_refused(tmp_path, weights):
    pool, network = CheckpointPool(write(tmp_path)), Small(9)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="weights have shape"):
        pool.merge_into(network, weights)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_network_is_refused(tmp_path):
    pool = CheckpointPool(write(tmp_path))
    narrow, wide = Small(), Small()
    narrow.second = nn.Linear(7, 4, bias=False)
    wide.third = nn.Linear(2, 2)
    for network, message in [
        (narrow, "second.weight"),
        (wide, "third"),
        (nn.Linear(2, 2), "weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool.merge_into(network, torch.ones(3))
    tied = Small()
    tied.alias = tied.second  # one tensor under two names, stored once
    pool.merge_into(tied, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"extra": torch.ones(2)}, r"extra is \(\(2,\), 'F32'\) in it, but absent"),
        (lambda state: {k: v for k, v in state.items() if k != "gain"}, "gain is absent in it"),
        (lambda state: state | {"gain": torch.ones(1)}, r"gain is \(\(1,\), 'F32'\) in it, but \(\(\), 'F32'\)"),
        (lambda state: state | {"gain": torch.ones(()).half()}, r"gain is \(\(\), 'F16'\) in it"),
    ],
)
@pytest.mark.parametrize("odd", [0, 1])
def test_odd_checkpoint_is_named(tmp_path, change, message, odd):
    paths = write(tmp_path, change=lambda index, state: change(state) if index == odd else None)
    with pytest.raises(ValueError, match=rf"{odd}\.safetensors is not like.*{message}"):
        CheckpointPool(paths)


def sharded(folder, seed=0):
    """Writes two shards and their index, as diffusers does."""
    folder.mkdir(parents=True, exist_ok=True)
    state = Small(seed).state_dict()
    placed = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / name)
        placed |= dict.fromkeys(keys, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return index


def test_all_kinds_of_sources_make_one_pool(tmp_path, monkeypatch):
    model, pipeline = tmp_path / "model", tmp_path / "pipeline"
    index = sharded(pipeline / "unet")
    for folder in (model, pipeline / "vae"):
        folder.mkdir()
    save_file(Small(1).state_dict(), model / "diffusion_pytorch_model.safetensors")
    save_file(Small(1).state_dict(), model / "diffusion_pytorch_model.fp16.safetensors")
    save_file({"x": torch.ones(1)}, pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    os.symlink(model / "diffusion_pytorch_model.safetensors", tmp_path / "link.safetensors")
    monkeypatch.chdir(tmp_path)
    pool = CheckpointPool(["model", "./pipeline", index, "link.safetensors", pipeline / "unet"], buffers=BUFFERS)
    merged = dict(pool.merged(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])))
    assert all(torch.equal(merged[key], Small(0).state_dict()[key]) for key in NAMES)
    assert [len(member.files) for member in pool.members] == [1, 2, 2, 1, 2]
    assert pool.members[0].source == "model"


def test_checkpoint_of_a_trainer_merges_into_its_network(tmp_path):
    tiny_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1, ema_decay=0.5).train()
    tiny_pipeline(3).save_pretrained(tmp_path / "other")
    saved = tmp_path / "run" / "checkpoint-1"
    pool, network = CheckpointPool([saved, tmp_path / "other"]), tiny_sit(9)
    stored = load_file(saved / "transformer" / "diffusion_pytorch_model.safetensors")
    for row, expected in ([0.0, 1.0], tiny_sit(3).state_dict()), ([1.0, 0.0], stored):
        pool.merge_into(network, torch.tensor(row))
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in expected.items())


def folder_with(path, **files):
    path.mkdir()
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def test_other_files_are_refused_with_a_remedy(tmp_path):
    small = tmp_path / "small.safetensors"
    save_file(Small().state_dict(), small)
    data, shards = small.read_bytes(), ("model-00001-of-00002__safetensors", "model-00002-of-00002__safetensors")
    cases = [
        (tmp_path / "absent", FileNotFoundError, "there is no file or folder"),
        ("./absent", FileNotFoundError, "there is no file or folder"),
        (folder_with(tmp_path / "empty"), FileNotFoundError, "no safetensors weights"),
        (folder_with(tmp_path / "bin", pytorch_model__bin=b"x"), FileNotFoundError, "weights_only=True"),
        (folder_with(tmp_path / "two", a__safetensors=data, b__safetensors=data), ValueError, "name one"),
        (folder_with(tmp_path / "cut", model__safetensors=data[:-1]), ValueError, "not a whole safetensors file"),
        (folder_with(tmp_path / "head", model__safetensors=data[:20]), ValueError, "not a whole safetensors file"),
        (folder_with(tmp_path / "none", model__safetensors=b""), ValueError, "not a whole safetensors file"),
        (folder_with(tmp_path / "huge", model__safetensors=b"\xff" * 64), ValueError, "not a whole safetensors file"),
        (folder_with(tmp_path / "text", notes__txt=b"x") / "notes.txt", ValueError, "is not a folder, a .safetensors"),
        (folder_with(tmp_path / "pth", a__pth=b"x") / "a.pth", ValueError, "weights_only=True"),
        (folder_with(tmp_path / "shard", **dict.fromkeys(shards, data)), ValueError, "several files of weights"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            CheckpointPool([small, source])
    for checkpoints in (str(small), []):
        with pytest.raises(ValueError, match="must be a list of at least one"):
            CheckpointPool(checkpoints)


@pytest.mark.parametrize("name", ["../small.safetensors", "/small.safetensors", "missing.safetensors", "a.bin", 7])
def test_index_names_only_files_of_its_folder(tmp_path, name):
    save_file(Small().state_dict(), tmp_path / "small.safetensors")
    index = sharded(tmp_path / "model")
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": placed | {"gain": name}}))
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards"):
        CheckpointPool([tmp_path / "model"])


def test_network_of_a_pipeline_with_two_is_named(tmp_path):
    for name, seed in (("unet", 0), ("transformer", 1)):
        (tmp_path / name).mkdir()
        save_file(Small(seed).state_dict(), tmp_path / name / "model.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="name the network's folder"):
        CheckpointPool([tmp_path])
    merged = dict(CheckpointPool([tmp_path / "transformer"]).merged(torch.ones(1)))
    assert torch.equal(merged["gain"], Small(1).gain.data)


def test_saved_merge_has_the_dtype_of_the_checkpoints(tmp_path):
    pool = CheckpointPool(write(tmp_path, dtype=torch.float16), buffers=BUFFERS)
    weights = torch.tensor([0.1, 0.2, 0.7])
    out, merged = tmp_path / "new" / "merged.safetensors", dict(pool.merged(weights))
    pool.save_merged(out, weights)
    assert all(torch.equal(value, merged[key].to(value.dtype)) for key, value in load_file(out).items())
    assert load_file(out)["gain"].dtype == torch.float16
    assert [path.name for path in out.parent.iterdir()] == ["merged.safetensors"]


def test_description_has_hashes_and_no_folders_of_this_machine(tmp_path):
    paths = write(tmp_path)
    described = CheckpointPool(paths, buffers=BUFFERS).describe()
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert [list(member["files"].values()) for member in described["members"]] == [[value] for value in hashes]
    assert described["copied_from_last"] == sorted(BUFFERS) and str(tmp_path) not in json.dumps(described)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_merge_is_saved_in_eight_bits(tmp_path, dtype):
    paths = write(tmp_path, dtype=dtype)
    CheckpointPool(paths, buffers=BUFFERS).save_merged(tmp_path / "merged.safetensors", torch.tensor([0.0, 1.0, 0.0]))
    merged, whole = load_file(tmp_path / "merged.safetensors"), load_file(paths[1])
    for name in NAMES:
        assert merged[name].dtype == dtype and torch.equal(merged[name].float(), whole[name].float())


def test_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    pool, out = CheckpointPool(write(tmp_path, dtype=torch.float16)), tmp_path / "out" / "merged.safetensors"
    pool.save_merged(out, torch.ones(3))
    before = out.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        pool.save_merged(out, torch.ones(3) * 1e6)

    def fill_disk(tensors, path, metadata):
        raise OSError("no space left")

    monkeypatch.setattr(pool_module, "save_file", fill_disk)
    with pytest.raises(OSError, match="no space"):
        pool.save_merged(out, torch.ones(3))
    assert out.read_bytes() == before and len([*out.parent.iterdir()]) == 1
