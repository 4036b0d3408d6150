# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import contextlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.conversion.snapshots import Call, storage_bytes, tensor_call
from trl_distreward.conversion import load_original_sit
from trl_distreward.conversion.restricted_pickle import check_sharded_state, load_records, read_array, read_tensor

EVIL = pickle.dumps(Call(os.system, "touch executed"))
TEN_GIGABYTES = 10 * 2**30


def read(data, path):
    path.write_bytes(data)
    return load_records(path)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_tensors_come_back_bit_by_bit(tmp_path, dtype, protocol):
    whole = (torch.randn(4, 6) * 100).to(dtype)
    tensors = [whole, whole.t(), whole[1:3, 2:], torch.zeros((), dtype=dtype), torch.empty(0, 3, dtype=dtype)]
    tensors.append(torch.nn.Parameter(whole, requires_grad=False))
    for record, tensor in zip(read(pickle.dumps(tensors, protocol), tmp_path / "p"), tensors, strict=True):
        back = read_tensor(record)
        assert back.dtype == dtype and torch.equal(back, tensor) and type(back) is torch.Tensor


def test_arrays_of_numbers_come_back(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4))
    for array in (values, values.astype(np.float32)[0], np.asfortranarray(values), values.astype(">f8")):
        back = read_array(read(pickle.dumps(array, protocol=4), tmp_path / "p"))
        assert np.array_equal(back, array) and back.dtype == array.dtype
    with pytest.raises((ValueError, TypeError)):
        read_array(read(pickle.dumps(np.array(["a", None])), tmp_path / "p"))


@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch executed"),
        Call(eval, "open('executed', 'w')"),
        Call(getattr, "text", "upper"),
        Call(torch.load, "executed"),
        Call(np.load, "executed"),
    ],
)
def test_code_is_refused_and_does_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for content in (call, {"ema": [call]}):
        with pytest.raises(pickle.UnpicklingError, match="not one of the known names"):
            read(pickle.dumps(content), tmp_path / "p")
    assert not Path("executed").exists()


def test_code_inside_a_storage_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    honest = storage_bytes([1.0, 2.0, 3.0])
    assert read_tensor(read(pickle.dumps(tensor_call(honest, (3,))), tmp_path / "p")).tolist() == [1, 2, 3]
    torch.save(Call(os.system, "touch executed"), "zipped")
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    for storage in (EVIL, magic + EVIL, honest[: honest.index(b"ctorch")] + EVIL[2:], Path("zipped").read_bytes()):
        record = read(pickle.dumps(tensor_call(storage, (3,))), tmp_path / "p")  # not looked into yet
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read_tensor(record)
    assert zipfile.is_zipfile("zipped") and not Path("executed").exists()


def test_state_given_to_a_known_name_changes_nothing(tmp_path):
    """BUILD on a name's stand-in, and not on an object made with it, is refused or has no effect."""
    name = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    with pytest.raises(pickle.UnpicklingError):
        read(name + b"}X\x04\x00\x00\x00argsK\x01sb.", tmp_path / "p")
    assert read(name + b")R.", tmp_path / "p").args == ()


def test_truncated_files_are_refused(tmp_path):
    data = pickle.dumps({"a": torch.randn(5), "b": list(range(300))})
    for length in [0, 1, 2, *range(3, len(data), 7), len(data) - 1]:
        with pytest.raises(pickle.UnpicklingError, match="damaged|truncated"):
            read(data[:length], tmp_path / "p")
    honest = storage_bytes([1.0, 2.0, 3.0])
    for length in (len(honest) - 1, len(honest) - 12, len(honest) - 20, 30):
        record = read(pickle.dumps(tensor_call(honest[:length], (3,))), tmp_path / "p")
        with pytest.raises((pickle.UnpicklingError, RuntimeError, struct.error, EOFError, ValueError)):
            read_tensor(record)


@pytest.mark.parametrize("kind", [b"\x8e", b"\x8d", b"\x95"], ids=["bytes", "text", "frame"])
def test_claims_of_gigabytes_are_refused(tmp_path, kind):
    with pytest.raises(pickle.UnpicklingError):
        read(b"\x80\x04" + kind + struct.pack("<Q", TEN_GIGABYTES) + b"few bytes.", tmp_path / "p")


@pytest.mark.parametrize("put", [b"r" + struct.pack("<I", 2**27), b"p134217728\n"], ids=["binary", "text"])
def test_claims_of_many_objects_are_refused(tmp_path, put):
    with pytest.raises(pickle.UnpicklingError, match="claims 134217728 objects in"):
        read(b"\x80\x02]" + put + b".", tmp_path / "p")


def test_an_archive_in_a_storage_that_claims_gigabytes_is_refused(tmp_path):
    torch.save(torch.zeros(10**6), tmp_path / "t")
    with (
        zipfile.ZipFile(tmp_path / "t") as stored,
        zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    record = read(pickle.dumps(tensor_call((tmp_path / "z").read_bytes(), (3,))), tmp_path / "p")
    with pytest.raises(ValueError, match="data/0 claims 4000000 bytes"):
        read_tensor(record)
    with pytest.raises(ValueError, match="data/0 claims 4000000 bytes"):
        load_original_sit(tmp_path / "z")


@pytest.mark.parametrize("place", [".metadata", "__1.metadata", "__0_0.distcp"])
def test_code_in_a_sharded_state_is_refused_and_does_not_run(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    state = {"exp_avg": torch.randn(3, 4).bfloat16(), "lr": 0.1}
    dcp.save(state, checkpoint_id="optimizer_0", no_dist=True)
    check_sharded_state(Path("optimizer_0"))
    if place == "__0_0.distcp":  # values that are no tensors are pickles too
        dcp.save({**state, "lr": Call(os.system, "touch executed")}, checkpoint_id="optimizer_0", no_dist=True)
    else:
        Path("optimizer_0", place).write_bytes(EVIL)
    with pytest.raises(ValueError, match="optimizer_0 is damaged, or would run code if it were read"):
        check_sharded_state(Path("optimizer_0"))
    assert not Path("executed").exists()
    if place != "__1.metadata":  # which only another process would read
        with contextlib.suppress(BaseException):
            dcp.load(state, checkpoint_id="optimizer_0", no_dist=True)
        assert Path("executed").exists()  # torch runs it


def test_tensors_that_claim_gigabytes_are_refused(tmp_path):
    values = [1.0, 2.0, 3.0]
    for call in (
        tensor_call(storage_bytes(values, numel=TEN_GIGABYTES // 4), (TEN_GIGABYTES // 4,)),
        tensor_call(storage_bytes(values), (50_000, 50_000), (0, 0)),
        tensor_call(storage_bytes(values), (3,), (10**9,)),
        tensor_call(storage_bytes(values), (2,), (1,), 2),
        tensor_call(storage_bytes(values), (2,), (-1,), 2),
    ):
        record = read(pickle.dumps(call), tmp_path / "p")
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            read_tensor(record)


def test_references_out_of_the_file_are_refused(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="persistent"):
        read(b"\x80\x02X\x01\x00\x00\x00aQ.", tmp_path / "p")
