# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import argparse
import os
from pathlib import Path

import pytest
import torch

from tests.conversion.snapshots import Call
from tests.helpers import tiny_sit
from trl_distreward import SiTTransformer2DModel
from trl_distreward.conversion import load_original_sit


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == j and torch.equal(v, w) for (k, v), (j, w) in pairs)


def same_config(a, b):
    return {k: v for k, v in a.config.items() if k[0] != "_"} == {k: v for k, v in b.config.items() if k[0] != "_"}


@pytest.mark.parametrize(
    "config",
    [
        {"learn_sigma": True},
        {"learn_sigma": False, "in_channels": 3, "patch_size": 1},
        {"sample_size": 8, "patch_size": 4, "mlp_ratio": 2.0, "num_layers": 3},
    ],
)
def test_config_follows_from_the_weights(tmp_path, config):
    model = tiny_sit(**config)
    torch.save(model.state_dict(), tmp_path / "sit.pt")
    loaded = load_original_sit(tmp_path / "sit.pt", num_attention_heads=2)
    assert same(loaded, model) and same_config(loaded, model) and not loaded.training
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("size", ["S/2", "B/4", "L/8", "XL/2"])
def test_published_sizes_are_known_by_their_shapes(size):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_size(size)
        assert same_config(load_original_sit(model.state_dict()), model)


def test_average_of_a_training_checkpoint_is_loaded(tmp_path):
    raw, average = tiny_sit(0), tiny_sit(1, class_dropout_prob=0.0)
    arguments = argparse.Namespace(model="tiny", num_classes=3, image_size=32)
    optimizer = torch.optim.AdamW(raw.parameters()).state_dict()
    checkpoint = {"model": raw.state_dict(), "ema": average.state_dict(), "opt": optimizer, "args": arguments}
    torch.save(checkpoint, tmp_path / "0000100.pt")
    loaded = load_original_sit(tmp_path / "0000100.pt", num_attention_heads=2)
    assert same(loaded, average) and loaded.config.num_classes == 3 and loaded.config.class_dropout_prob == 0


def test_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = Call(os.system, "touch executed")
    cases = [evil, {"ema": tiny_sit().state_dict(), "args": evil}, {"ema": {"x": evil}}, {"args": Path("a")}]
    for zipped in (True, False):
        for content in cases:
            torch.save(content, "sit.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="refused as a SiT checkpoint.*argparse.Namespace"):
                load_original_sit("sit.pt")
        torch.save([1], "sit.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="neither a state dict nor"):
            load_original_sit("sit.pt")
        torch.save(tiny_sit().state_dict(), "sit.pt", _use_new_zipfile_serialization=zipped)
        whole = Path("sit.pt").read_bytes()
        Path("sit.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged"):
            load_original_sit("sit.pt")
    assert not Path("executed").exists()


def changed(**changes):
    state_dict = {**tiny_sit().state_dict(), **changes}
    return {name: value for name, value in state_dict.items() if value is not None}


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (changed(), {"num_attention_heads": None}, "not one of SiT's sizes"),
        (changed(**{"blocks.0.norm1.weight": torch.ones(16)}), {}, "Unexpected key.*blocks.0.norm1.weight"),
        (changed(**{"blocks.1.mlp.fc2.bias": None}), {}, "Missing key.*blocks.1.mlp.fc2.bias"),
        (changed(**{"blocks.1.mlp.fc2.bias": torch.ones(1)}), {}, "size mismatch for blocks.1.mlp.fc2.bias"),
        (changed(pos_embed=None), {}, "lacks pos_embed"),
        (changed(), {"num_classes": 9}, "num_classes=9 does not fit an embedding of 4 rows"),
        ({"state_dict": {}}, {}, "neither a state dict nor"),
        ({"ema": [1]}, {}, "neither a state dict nor"),
    ],
)
def test_other_checkpoints_are_refused(checkpoint, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_original_sit(checkpoint, **{"num_attention_heads": 2, **options})
