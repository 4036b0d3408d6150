# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pools of local checkpoints: what a merge is, what is copied, and what is refused before anything is computed."""

import hashlib
import json
import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import tiny_pipeline, tiny_sit, tiny_trainer
from trl_distreward import CheckpointPool
from trl_distreward.merging import sums


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


def write(folder, count=3, dtype=None, change=None):
    """Files of `count` networks; `change(index, state)` may alter one."""
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


@pytest.fixture(autouse=True)
def silent_copies():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*differ between checkpoints")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merge_is_the_weighted_sum(tmp_path, dtype):
    paths = write(tmp_path, dtype=dtype)
    weights = torch.tensor([-0.36, 1.39, -0.03], dtype=torch.float64)
    merged = dict(CheckpointPool(paths, buffers=BUFFERS).merged(weights))
    states = [load_file(path) for path in paths]
    assert list(merged) == CheckpointPool(paths).keys and set(merged) == set(states[0])
    for key in NAMES:
        expected = sum(weight * state[key].double() for weight, state in zip(weights, states, strict=True))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert merged[key].dtype == wide and merged[key].shape == states[0][key].shape
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-6)


def test_sums_do_not_depend_on_the_size_of_blocks(tmp_path, monkeypatch):
    tensors = [torch.randn(1000) for _ in range(4)]
    whole = sums.weighted_sum(tensors, [0.1, 0.2, 0.3, 0.4], torch.empty(1000))
    monkeypatch.setattr(sums, "BLOCK", 64)
    assert torch.equal(whole, sums.weighted_sum(tensors, [0.1, 0.2, 0.3, 0.4], torch.empty(1000)))


@pytest.mark.parametrize("index", [0, 2])
def test_one_checkpoint_alone_comes_out_bit_by_bit(tmp_path, index):
    def spoil(number, state):
        state["gain"] = torch.tensor(float("inf")) if number != index else torch.tensor(-0.0)

    paths = write(tmp_path, change=spoil)
    merged = dict(CheckpointPool(paths, buffers=BUFFERS).merged(torch.eye(3)[index]))
    state = load_file(paths[index])
    assert all(
        torch.equal(merged[key].view(-1).view(torch.uint8), state[key].view(-1).view(torch.uint8)) for key in NAMES
    )


def test_buffers_and_integers_are_copied_from_the_last(tmp_path):
    def change(index, state):
        state["frequencies"] = state["frequencies"] + index

    paths = write(tmp_path, change=change)
    pool, weights = CheckpointPool(paths, buffers=BUFFERS), torch.tensor([3.0, 4.0, 5.0])
    assert pool.copied == {*BUFFERS} and set(pool.weighted) == NAMES
    last = load_file(paths[-1])
    with pytest.warns(UserWarning, match=r"2 buffers .* e.g. count: .*2.safetensors"):
        merged = dict(pool.merged(weights))
    for key in BUFFERS:
        assert merged[key].dtype == last[key].dtype and torch.equal(merged[key], last[key])
    # a network tells its buffers even where nobody named them; integers need no name
    network = Small(9)
    CheckpointPool(paths).merge_into(network, weights)
    assert all(torch.equal(network.state_dict()[key], last[key]) for key in BUFFERS)
    # what is handed out may be changed without changing the pool
    merged["count"].add_(1)
    assert torch.equal(dict(pool.merged(weights))["count"], last["count"])


def test_equal_buffers_give_no_warning(tmp_path):
    def change(index, state):
        state["count"] = torch.tensor(1)

    pool = CheckpointPool(write(tmp_path, change=change), buffers=BUFFERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dict(pool.merged(torch.ones(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_a_network_is_the_same_merge(tmp_path, dtype):
    pool = CheckpointPool(write(tmp_path), buffers=BUFFERS)
    network = Small(9).to(dtype)
    network.second.weight.data = network.second.weight.data.t().contiguous().t()  # of another layout
    addresses = {name: p.data_ptr() for name, p in network.named_parameters()}
    weights = torch.tensor([0.2, 0.3, 0.5])
    pool.merge_into(network, weights)
    for key, value in pool.merged(weights):
        assert torch.equal(network.state_dict()[key], value.to(network.state_dict()[key].dtype)), key
    assert addresses == {name: p.data_ptr() for name, p in network.named_parameters()}
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())


def test_groups_weigh_tensors_on_their_own(tmp_path):
    pool = CheckpointPool(write(tmp_path), buffers=BUFFERS)
    rows = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]])
    groups = {key: int(key.startswith("second")) for key in pool.weighted}
    merged, alone = dict(pool.merged(rows, groups)), [dict(pool.merged(row)) for row in rows]
    assert all(torch.equal(merged[key], alone[groups[key]][key]) for key in groups)
    network = Small(9)
    pool.merge_into(network, rows, groups)
    assert all(torch.equal(network.state_dict()[key], merged[key]) for key in groups)
    missing = dict(list(groups.items())[1:])
    for wrong, message in [
        (missing, "must name every"),
        ({**groups, "typo": 0}, "typo"),
        ({**groups, "gain": 2}, "gain"),
        ({**groups, "gain": -1}, "gain"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool.merged(rows, wrong)


@pytest.mark.parametrize(
    "weights", [torch.ones(2), torch.ones(1, 3), torch.tensor([0.0, float("nan"), 1.0]), torch.ones(())]
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    pool, network = CheckpointPool(write(tmp_path)), Small(9)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="weights"):
        pool.merge_into(network, weights)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_network_of_another_kind_is_refused(tmp_path):
    pool = CheckpointPool(write(tmp_path))
    narrow, wide = Small(), Small()
    narrow.second = nn.Linear(7, 4, bias=False)
    wide.third = nn.Linear(2, 2)
    for network, message in [(narrow, r"second.weight is \(4, 7\)"), (wide, "third"), (nn.Linear(2, 2), "has")]:
        with pytest.raises(ValueError, match=message):
            pool.merge_into(network, torch.ones(3))
    tied = Small()
    tied.alias = tied.second  # one tensor under two names, stored once
    pool.merge_into(tied, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"extra": torch.ones(2)}, r"extra is \(2,\) float32 in it, but absent"),
        (lambda state: {k: v for k, v in state.items() if k != "gain"}, "gain is absent in it"),
        (lambda state: state | {"gain": torch.ones(1)}, r"gain is \(1,\) float32 in it, but \(\) float32"),
        (lambda state: state | {"gain": torch.ones(()).half()}, r"gain is \(\) float16 in it"),
    ],
)
@pytest.mark.parametrize("odd", [0, 1])
def test_the_odd_one_out_is_named_before_weights_are_read(tmp_path, monkeypatch, change, message, odd):
    paths = write(tmp_path, change=lambda index, state: change(state) if index == odd else None)
    monkeypatch.setattr("trl_distreward.merging.pool.safe_open", None)  # weights cannot be read
    with pytest.raises(ValueError, match=rf"{odd}\.safetensors is not like.*{message}"):
        CheckpointPool(paths)


def sharded(folder, seed=0):
    """Two shards and their index, as diffusers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = Small(seed).state_dict()
    shards = [sorted(state)[::2], sorted(state)[1::2]]
    placed = {}
    for number, keys in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / name)
        placed |= dict.fromkeys(keys, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def test_every_kind_of_source_is_the_same_pool(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    save_file(Small(1).state_dict(), model / "diffusion_pytorch_model.safetensors")
    save_file(Small(1).state_dict(), model / "diffusion_pytorch_model.fp16.safetensors")
    pipeline = tmp_path / "pipeline"
    index = sharded(pipeline / "unet")
    (pipeline / "vae").mkdir()
    save_file({"x": torch.ones(1)}, pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    link = tmp_path / "link.safetensors"
    os.symlink(model / "diffusion_pytorch_model.safetensors", link)
    monkeypatch.chdir(tmp_path)
    pool = CheckpointPool(["model", "./pipeline", index, "link.safetensors", pipeline / "unet"], buffers=BUFFERS)
    merged = dict(pool.merged(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])))
    assert all(torch.equal(merged[key], Small(0).state_dict()[key]) for key in NAMES)
    assert [len(member.files) for member in pool.members] == [1, 2, 2, 1, 2]
    assert pool.members[0].path == model and pool.members[0].source == "model"


def test_checkpoint_of_a_trainer_merges_into_its_network(tmp_path):
    tiny_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1, ema_decay=0.5).train()
    tiny_pipeline(3).save_pretrained(tmp_path / "other")
    pool = CheckpointPool([tmp_path / "run" / "checkpoint-1", tmp_path / "other"])
    network = tiny_sit(9)
    pool.merge_into(network, torch.tensor([0.0, 1.0]))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in tiny_sit(3).state_dict().items())
    pool.merge_into(network, torch.tensor([1.0, 0.0]))
    stored = load_file(tmp_path / "run" / "checkpoint-1" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in stored.items())


def folder_with(path, **files):
    path.mkdir()
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def test_what_is_no_checkpoint_is_refused_with_a_remedy(tmp_path):
    small = tmp_path / "small.safetensors"
    save_file(Small().state_dict(), small)
    data = small.read_bytes()
    cases = [
        (tmp_path / "absent", FileNotFoundError, "there is no file or folder"),
        ("./absent", FileNotFoundError, "there is no file or folder"),
        (folder_with(tmp_path / "empty"), FileNotFoundError, "no safetensors weights"),
        (folder_with(tmp_path / "bin", pytorch_model__bin=b"x"), FileNotFoundError, "weights_only=True"),
        (folder_with(tmp_path / "two", a__safetensors=data, b__safetensors=data), ValueError, "name one"),
        (folder_with(tmp_path / "cut", model__safetensors=data[:-1]), ValueError, "cut short"),
        (folder_with(tmp_path / "head", model__safetensors=data[:20]), ValueError, "header"),
        (folder_with(tmp_path / "none", model__safetensors=b""), ValueError, "header"),
        (folder_with(tmp_path / "huge", model__safetensors=b"\xff" * 64), ValueError, "header"),
        (folder_with(tmp_path / "text", notes__txt=b"x") / "notes.txt", ValueError, "is no checkpoint"),
        (folder_with(tmp_path / "pth", a__pth=b"x") / "a.pth", ValueError, "pickles"),
    ]
    shard = "model-00001-of-00002__safetensors"
    cases.append((folder_with(tmp_path / "shard", **{shard: data}), FileNotFoundError, "shards but no"))
    link = tmp_path / "dangling.safetensors"
    os.symlink(tmp_path / "nowhere", link)
    cases.append((link, FileNotFoundError, "nowhere"))
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            CheckpointPool([small, source])
    with pytest.raises(ValueError, match="list"):
        CheckpointPool(str(small))
    with pytest.raises(ValueError, match="at least one"):
        CheckpointPool([])


@pytest.mark.parametrize("name", ["../small.safetensors", "/small.safetensors", "sub/a.safetensors", "a.bin", 7])
def test_index_cannot_name_files_elsewhere(tmp_path, name):
    save_file(Small().state_dict(), tmp_path / "small.safetensors")
    index = sharded(tmp_path / "model")
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": placed | {"gain": name}}))
    with pytest.raises(ValueError, match="weight_map|must lie in the folder"):
        CheckpointPool([tmp_path / "model"])


def test_shards_may_have_spaces_in_their_names(tmp_path):
    index = sharded(tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace("-of-", " of ")))
    index.write_text(index.read_text().replace("-of-", " of "))
    assert set(CheckpointPool([tmp_path / "model"]).keys) == set(Small().state_dict())


def test_index_and_shards_must_agree(tmp_path):
    index = sharded(tmp_path / "model")
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": placed | {"ghost": placed["gain"]}}))
    with pytest.raises(ValueError, match="lacks ghost"):
        CheckpointPool([tmp_path / "model"])
    index.write_text(json.dumps({"weight_map": placed}))
    (tmp_path / "model" / placed["gain"]).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards"):
        CheckpointPool([tmp_path / "model"])
    index.write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        CheckpointPool([tmp_path / "model"])


def test_header_that_claims_too_much_is_refused(tmp_path):
    for number, entry in enumerate(
        [
            {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1]},
            [],
        ]
    ):
        header = json.dumps({"x": entry}).encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(ValueError, match="header|dtype"):
            CheckpointPool([path])


def test_pipeline_component_is_chosen(tmp_path):
    for name, seed in (("unet", 0), ("transformer", 1)):
        (tmp_path / name).mkdir()
        save_file(Small(seed).state_dict(), tmp_path / name / "model.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="component="):
        CheckpointPool([tmp_path])
    with pytest.raises(ValueError, match="'vae'"):
        CheckpointPool([tmp_path], component="vae")
    merged = dict(CheckpointPool([tmp_path], component="transformer").merged(torch.ones(1)))
    assert torch.equal(merged["gain"], Small(1).gain.data)


def test_saved_merge_says_what_it_was_made_of(tmp_path):
    paths = write(tmp_path, dtype=torch.float16)
    pool, weights = CheckpointPool(paths, buffers=BUFFERS), torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    out = tmp_path / "new" / "merged.safetensors"
    pool.save_merged(out, weights, {"recipe": {"method": "emanet"}})
    saved, merged = load_file(out), dict(pool.merged(weights))
    assert all(torch.equal(saved[key], merged[key].to(pool.dtypes[key])) for key in pool.keys)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["coefficients"]) == weights.tolist()
    assert json.loads(metadata["recipe"]) == {"method": "emanet"}
    about = json.loads(metadata["pool"])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert [list(member["files"].values()) for member in about["members"]] == [[value] for value in hashes]
    assert str(tmp_path) not in metadata["pool"]  # a public file keeps no folders of this machine
    pool.save_merged(out, weights, dtype=torch.float32)
    assert torch.equal(load_file(out)["gain"], merged["gain"])
    assert [path.name for path in out.parent.iterdir()] == ["merged.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_merge_is_saved_in_eight_bits(tmp_path, dtype):
    paths = write(tmp_path, dtype=dtype)
    CheckpointPool(paths, buffers=BUFFERS).save_merged(tmp_path / "merged.safetensors", torch.tensor([0.0, 1.0, 0.0]))
    merged, whole = load_file(tmp_path / "merged.safetensors"), load_file(paths[1])
    for name in NAMES:
        assert merged[name].dtype == dtype and torch.equal(merged[name].float(), whole[name].float())


def test_merge_that_overflows_or_fails_leaves_the_file_that_was(tmp_path, monkeypatch):
    pool, out = CheckpointPool(write(tmp_path, dtype=torch.float16)), tmp_path / "out" / "merged.safetensors"
    pool.save_merged(out, torch.ones(3))
    before = out.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        pool.save_merged(out, torch.ones(3) * 1e6)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("trl_distreward.merging.pool.save_file", full)
    with pytest.raises(OSError, match="no space"):
        pool.save_merged(out, torch.ones(3))
    assert out.read_bytes() == before and len([*out.parent.iterdir()]) == 1


def test_file_changed_under_the_pool_is_not_described_as_the_pool(tmp_path):
    paths = write(tmp_path)
    pool = CheckpointPool(paths)
    save_file(Small(7).state_dict(), paths[1])
    with pytest.raises(ValueError, match="was changed after"):
        pool.describe()


def test_pool_keeps_no_copy_of_what_it_maps(tmp_path):
    """A merge allocates the sum of one tensor; the pool lies in the files."""
    save_file({"x": torch.randn(1 << 22)}, tmp_path / "a.safetensors")
    pool = CheckpointPool([tmp_path / "a.safetensors"] * 4)
    from torch.profiler import ProfilerActivity, profile

    network = nn.ParameterDict({"x": torch.zeros(1 << 22)})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        pool.merge_into(network, torch.ones(4))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in recorded.events())
    assert allocated < 1 << 20, allocated
