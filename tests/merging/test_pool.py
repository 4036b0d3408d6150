# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of local checkpoints: the merge, the copied tensors, and the checkpoints that are refused."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
    paths = [folder / f"{index}.safetensors" for index in range(count)]
    for index, path in enumerate(paths):
        network = Small(index).to(dtype)  # integers stay
        state = network.state_dict()
        save_file(change(index, state) or state if change else state, path)
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


def network(**layers):
    made = Small(9)
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made


@pytest.mark.parametrize(
    ("network", "weights", "message"),
    [
        (network(), torch.ones(2), "weights have shape"),
        (network(), torch.ones(1, 3), "weights have shape"),
        (network(), torch.ones(()), "weights have shape"),
        (network(second=nn.Linear(7, 4, bias=False)), torch.ones(3), "second.weight"),
        (network(third=nn.Linear(2, 2)), torch.ones(3), "third"),
        (nn.Linear(2, 2), torch.ones(3), "weight"),
    ],
)
def test_weights_or_networks_that_do_not_fit_are_refused_and_change_nothing(tmp_path, network, weights, message):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        CheckpointPool(write(tmp_path)).merge_into(network, weights)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_tensor_under_two_names_needs_to_be_stored_once(tmp_path):
    tied = Small()
    tied.alias = tied.second
    CheckpointPool(write(tmp_path)).merge_into(tied, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"extra": torch.ones(2)}, "extra"),
        (lambda state: {k: v for k, v in state.items() if k != "gain"}, "gain is absent in it"),
        (lambda state: state | {"gain": torch.ones(1)}, r"gain is \(\(1,\), 'F32'\) in it, but \(\(\), 'F32'\)"),
        (lambda state: state | {"gain": torch.ones(()).half()}, "gain .*F16"),
    ],
)
@pytest.mark.parametrize("odd", [0, 1])
def test_odd_checkpoint_is_named(tmp_path, change, message, odd):
    paths = write(tmp_path, change=lambda index, state: change(state) if index == odd else None)
    with pytest.raises(ValueError, match=rf"{odd}\.safetensors is not like.*{message}"):
        CheckpointPool(paths)


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"activation_fn": "silu"}])
def test_a_checkpoint_of_the_same_shapes_and_another_architecture_is_named(tmp_path, change):
    config = {"num_attention_heads": 2, "activation_fn": "gelu"}
    for name, about in (("a", {}), ("b", {"_diffusers_version": "0.43", "of_one_release": 1}), ("c", change)):
        (tmp_path / name).mkdir()
        save_file(Small().state_dict(), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"_diffusers_version": "0.42"} | config | about))
    CheckpointPool([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=rf"c is not like .*a: {[*change][0]} is .* in its config.json, but .* there"):
        CheckpointPool([tmp_path / "a", tmp_path / "b", tmp_path / "c"])


def sharded(folder, seed=0, variant=""):
    """Writes two shards and their index, as diffusers does."""
    folder.mkdir(parents=True, exist_ok=True)
    state = Small(seed).state_dict()
    placed = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        name = f"diffusion_pytorch_model{variant}-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / name)
        placed |= dict.fromkeys(keys, name)
    index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return index


@pytest.mark.parametrize("variant", [".fp16", ".non_ema"])
def test_shards_of_a_variant_are_found_and_yield_to_the_usual_ones(tmp_path, variant):
    index = sharded(tmp_path / "unet", 1, variant)
    (tmp_path / "model_index.json").write_text("{}")
    for source in (tmp_path, tmp_path / "unet", index):
        (member,) = CheckpointPool([source]).members
        assert len(member.files) == 2 and all(variant in name for name in member.files)
    sharded(tmp_path / "unet")
    (member,) = CheckpointPool([tmp_path]).members
    assert len(member.files) == 2 and not any(variant in name for name in member.files)


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


@pytest.mark.parametrize(
    ("names", "content", "kind", "message"),
    [
        ([], b"", FileNotFoundError, "no safetensors weights"),
        (["pytorch_model.bin"], b"x", FileNotFoundError, "weights_only=True"),
        (["a.safetensors", "b.safetensors"], slice(None), ValueError, "name one"),
        (["model.safetensors"], slice(-1), ValueError, "not a whole safetensors file"),
        (["model.safetensors"], slice(20), ValueError, "not a whole safetensors file"),
        (["model.safetensors"], b"", ValueError, "not a whole safetensors file"),
        (["model.safetensors"], b"\xff" * 64, ValueError, "not a whole safetensors file"),
        ([f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], slice(None), ValueError, "several files of weights"),
        (["model_index.json", "unet/a.safetensors", "transformer/a.safetensors"], b"", ValueError, "name the"),
    ],
    ids=str,
)
def test_other_folders_are_refused_with_a_remedy(tmp_path, names, content, kind, message):
    save_file(Small().state_dict(), tmp_path / "small.safetensors")
    whole = (tmp_path / "small.safetensors").read_bytes()
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "other" / name for name in names):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole[content] if isinstance(content, slice) else content)
    with pytest.raises(kind, match=message):
        CheckpointPool([tmp_path / "small.safetensors", tmp_path / "other"])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("absent", FileNotFoundError, "there is no file or folder"),
        ("notes.txt", ValueError, "is not a folder, a .safetensors"),
        ("a.pth", ValueError, "weights_only=True"),
    ],
)
def test_other_files_are_refused_with_a_remedy(tmp_path, name, kind, message):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a.pth").touch()
    with pytest.raises(kind, match=message):
        CheckpointPool([tmp_path / name])
    with pytest.raises(ValueError, match="must be a list of at least one"):
        CheckpointPool(str(tmp_path / name))


@pytest.mark.parametrize("name", ["../small.safetensors", "/small.safetensors", "missing.safetensors", "a.bin", 7])
def test_index_names_only_files_of_its_folder(tmp_path, name):
    save_file(Small().state_dict(), tmp_path / "small.safetensors")
    index = sharded(tmp_path / "model")
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": placed | {"gain": name}}))
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards"):
        CheckpointPool([tmp_path / "model"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_saved_merge_has_the_dtype_of_the_checkpoints(tmp_path, dtype):
    pool = CheckpointPool(write(tmp_path, dtype=dtype), buffers=BUFFERS)
    weights = torch.tensor([0.1, 0.2, 0.7])
    out, merged = tmp_path / "new" / "merged.safetensors", dict(pool.merged(weights))
    pool.save_merged(out, weights)
    for name, value in load_file(out).items():
        assert value.dtype == dtype or name == "count"
        assert torch.equal(value.float(), merged[name].to(value.dtype).float())
    assert [path.name for path in out.parent.iterdir()] == ["merged.safetensors"]


def test_description_has_hashes_and_no_folders_of_this_machine(tmp_path):
    paths = write(tmp_path)
    described = CheckpointPool(paths, buffers=BUFFERS).describe()
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert [list(member["files"].values()) for member in described["members"]] == [[value] for value in hashes]
    assert described["copied_from_last"] == sorted(BUFFERS) and str(tmp_path) not in json.dumps(described)


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
