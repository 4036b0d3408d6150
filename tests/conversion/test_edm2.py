# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.conversion.snapshots import Call, original_modules, persistent, snapshot
from tests.edm2 import tiny_edm2
from trl_distreward.conversion import load_original_edm2, read_original_edm2


def write(tmp_path, data):
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    return path


def test_snapshot_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_edm2(in_channels=4, num_blocks=2, clip_act=None, dropout=0.1)
    original = read_original_edm2(write(tmp_path, snapshot(model)))
    published = {name: value.half() for name, value in model.state_dict().items()}
    assert list(original.state_dict) == list(published)
    for name, value in original.state_dict.items():
        assert value.dtype == torch.float16 and torch.equal(value, published[name])
    assert {name: model.config[name] for name in original.config} == original.config
    assert original.vae == "stabilityai/sd-vae-ft-mse"
    assert original.latents["latents_scale"] == pytest.approx([0.1] * 4)
    assert original.latents["latents_bias"] == [0, 1, 2, 3]
    assert not Path("executed").exists()  # by the code in it


def test_loaded_network_denoises_like_its_original(tmp_path):
    model = tiny_edm2()
    for name, value in model.state_dict().items():
        value.copy_(value.half())  # the file holds float16
        assert value.dtype == torch.float32, name
    path = write(tmp_path, snapshot(model, in_latents=False))
    loaded = load_original_edm2(path)
    z, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0]), torch.tensor([0, 4])
    assert torch.equal(loaded(z, sigma, labels).sample, model(z, sigma, labels).sample)
    assert loaded.config.sample_size == 8 and not loaded.training
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert read_original_edm2(path).vae is None
    half = load_original_edm2(path, torch.float16)
    assert half.dtype == torch.float16 and half.unet.out_gain.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "UNet"}, "its network is a UNet"),
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter=\[1, 3, 3, 1\]"),
        ({"channel_mult_emb": 8}, "channel_mult_emb=8"),
        ({"num_blocks": "3"}, "do not fit its network"),
        ({"model_channels": 16}, "do not fit its network"),
        ({"label_dim": 0}, "do not fit its network"),
        ({"label_dim": 7}, "do not fit its network"),
        ({"channel_mult": [None]}, "do not fit its network"),
        ({"model_channels": 10**30}, "do not fit its network"),
    ],
)
def test_impossible_networks_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_original_edm2(write(tmp_path, snapshot(tiny_edm2(in_channels=4), **changes)))


def test_other_files_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = snapshot(tiny_edm2())
    with original_modules():
        other = pickle.dumps({"ema": Call(os.system, "touch executed")})
    cases = {
        "posix.system|nt.system": other,
        "damaged": whole[: len(whole) // 2],
        "laid out": pickle.dumps({"network": 1}),
        "int": pickle.dumps({"ema": 1}),
        "not one of the known names": whole.replace(b"EasyDict", b"EvilDict"),
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=f"network.pkl is refused as an EDM2 snapshot: .*({message})"):
            load_original_edm2(write(tmp_path, data))
    assert not Path("executed").exists()
    with pytest.raises(FileNotFoundError):
        load_original_edm2(tmp_path / "absent.pkl")


def test_snapshots_that_claim_more_than_they_hold_are_refused(tmp_path):
    def written(network):
        with original_modules():
            return write(tmp_path, pickle.dumps({"ema": network}))

    whole, empty = torch.nn.Linear(40, 40, bias=False), persistent(torch.nn.Identity())
    repeated = persistent(whole, "Precond")
    repeated.state["_buffers"] |= dict.fromkeys(map(str, range(50)), whole.weight.data)
    nested = empty
    for _ in range(40):  # 2 ** 40 modules
        nested, inner = persistent(torch.nn.Identity(), "Precond"), nested
        nested.state["_modules"] = {"left": inner, "right": inner}
    for network, message in ((repeated, "its weights take more memory than its"), (nested, "'_modules'")):
        with pytest.raises(ValueError, match=f"is refused as an EDM2 snapshot: .*{message}"):
            read_original_edm2(written(network))
    for name, many in (("num_blocks", 10**8), ("channel_mult", [1] * 10**5)):
        with pytest.raises(ValueError, match="weights are too few for so many blocks"):
            load_original_edm2(write(tmp_path, snapshot(tiny_edm2(), **{name: many})))
