# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.edm2 import tiny_edm2_pipeline
from trl_distreward.merging.stamp import add_metadata, stamp_network


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


def test_network_is_stamped_and_the_guider_of_the_same_class_is_not(tmp_path):
    tiny_edm2_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == index["guider"]
    index["scales"] = [1.0]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    stamp_network(tmp_path, "unet", {"num_images": 3})
    stamp_network(tmp_path, None, {"num_images": 4})
    found = {}
    for part in ("unet", "guider"):
        with safe_open(tmp_path / part / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            found[part] = (file.metadata() or {}).get("num_images")
    assert found == {"unet": "3", "guider": None}
