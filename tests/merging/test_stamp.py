# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_distreward.merging.stamp import add_metadata


@pytest.mark.parametrize("text", ["", "ünïcode", "x" * 1001])
def test_metadata_is_added_and_tensors_stay(tmp_path, text):
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(3, 5), "i": torch.arange(7), "half": torch.randn(3).bfloat16()}
    save_file(tensors, path, metadata={"format": "pt", "old": "1"})
    add_metadata(path, {"old": "2", "new": text})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "old": "2", "new": text}
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_no_safetensors_file_stays_as_it_was(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match="is no safetensors file"):
        add_metadata(path, {"a": "b"})
    assert path.read_bytes() == b"not one" and len(list(tmp_path.iterdir())) == 1
