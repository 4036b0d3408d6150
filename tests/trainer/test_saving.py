# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A saved model takes the place of an old one whole or not at all, and tells nothing of the machine."""

import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig, get_peft_model

from tests.helpers import (
    QUIET,
    tiny_pipeline,
    tiny_pool,
    tiny_reward,
    tiny_sit,
    tiny_trainer,
    tiny_vae,
)
from tests.runs import EVALUATE_EVERY_STEP, SAVE_EVERY_STEP, Rising, assert_same_weights
from trl_distreward import MergeCoefficientConfig, MergeCoefficientTrainer, SiTPipeline, load_pipeline, saving

BEST = {"metric_for_best_model": "ode_rising", "load_best_model_at_end": True}


def files(folder):
    """All files below a folder, with their content's hash."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in found}


def old_model(folder):
    """Writes a model in shards, with a variant, a pickle, an adapter and a part that the tiny pipeline lacks."""
    tiny_pipeline(1).save_pretrained(folder, max_shard_size="4KB")
    network, index = folder / "transformer", json.loads((folder / "model_index.json").read_text())
    tiny_pipeline(1).save_pretrained(folder, variant="fp16", max_shard_size="4KB")
    assert len(list(network.glob("*.index*.json"))) == 2
    (network / "diffusion_pytorch_model.bin").touch()
    shutil.copytree(network, folder / "guider")
    shutil.copytree(network, folder / "adapter")
    (folder / "model_index.json").write_text(json.dumps(index | {"guider": index["transformer"]}))
    (folder / "notes.txt").write_text("mine")
    return folder


def trainer_of(kind, folder, model=None):
    if kind == "train":
        return tiny_trainer(folder, model)
    folder.mkdir()
    config = MergeCoefficientConfig(str(folder), max_steps=1, num_generations=2, **QUIET)
    return MergeCoefficientTrainer(model or tiny_pipeline(), tiny_pool(folder), tiny_reward(), config)


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_a_save_over_an_old_model_leaves_nothing_of_it(tmp_path, kind):
    trainer, old = trainer_of(kind, tmp_path / "run"), old_model(tmp_path / "old")
    for folder in (old, tmp_path / "new"):
        trainer.save_model(str(folder))
    expected = files(tmp_path / "new")
    assert files(old).keys() == {*expected, "notes.txt"} and "README.md" in expected
    assert not (tmp_path / "run" / "README.md").exists()
    assert_same_weights(load_pipeline(old).transformer, load_pipeline(tmp_path / "new").transformer)
    assert not [path for path in old.iterdir() if path.name.startswith("_")]


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_a_save_that_fails_leaves_the_old_model_whole(tmp_path, monkeypatch, kind):
    trainer, old = trainer_of(kind, tmp_path / "run"), old_model(tmp_path / "old")
    before, save, replace, calls = files(old), trainer.policy.save_pretrained, os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == moment:
            raise OSError(28, "No space left on device")
        return replace(*paths) if len(paths) == 2 else None

    monkeypatch.setattr(trainer.policy, "save_pretrained", lambda path, model: save(path, model) or failing(path))
    monkeypatch.setattr(os, "replace", failing)
    for moment in range(1, 100):
        calls.clear()
        try:
            trainer.save_model(str(old))
            break
        except OSError:
            assert files(old) == before, moment
    assert moment >= 12
    load_pipeline(old)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_is_saved_over_the_folder_that_it_was_loaded_from(tmp_path, kind):
    tiny_pipeline().save_pretrained(tmp_path)
    pipeline = SiTPipeline.from_pretrained(kind(tmp_path))  # its weights are mapped into memory
    trainer = tiny_trainer(tmp_path, model=pipeline, peft_config=LoraConfig(r=2, target_modules=["qkv"]), max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_model()
    merged = trainer.network.merge_and_unload()
    assert_same_weights(load_pipeline(tmp_path).transformer, merged)


def brightness(images, **kwargs):
    return images.float().mean((1, 2, 3))


def adapters(folder):
    """Writes adapters of the tiny network that name a folder of this machine."""
    for seed, name in enumerate("ab"):
        network, config = tiny_sit(), LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
        torch.manual_seed(seed)
        adapted = get_peft_model(network, config)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / name)
        yield str(folder / name)


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_nothing_that_is_saved_names_a_folder_or_a_token_of_the_machine(tmp_path, monkeypatch, kind):
    home, token, metrics = tmp_path / "alice", "hf_" + "a1" * 12, {"rising": Rising()}
    monkeypatch.setenv("HOME", str(home))
    pipeline = tiny_pipeline() if kind == "merge" else SiTPipeline(tiny_sit(in_channels=4), tiny_vae())
    pipeline.save_pretrained(home / "base")
    settings = {"run_name": f"{home}/{token}", "max_steps": 2, **SAVE_EVERY_STEP, **EVALUATE_EVERY_STEP, **BEST}
    if kind == "merge":
        config = MergeCoefficientConfig(str(home / "run"), num_generations=2, **QUIET | settings)
        pool = [*adapters(home)]
        trainer = MergeCoefficientTrainer(home / "base", pool, tiny_reward(), config, eval_metrics=metrics)
    else:
        lora = LoraConfig(r=2, base_model_name_or_path=str(home / "base"))
        trainer = tiny_trainer(home / "run", home / "base", brightness, lora, metrics, **settings)
    trainer.train()
    trainer.save_model()
    names = {*files(home / "run")}
    assert {"run.json", "README.md", "training_args.json", "checkpoint-2/trainer_state.json"} < names
    told = [n for n in names for word in ("alice", token) if word.encode() in (home / "run" / n).read_bytes()]
    assert told == []


def test_the_best_model_is_found_in_a_folder_of_another_name(tmp_path, caplog):
    def run(folder, steps):
        settings = {"max_steps": steps, **SAVE_EVERY_STEP, **EVALUATE_EVERY_STEP, **BEST}
        return tiny_trainer(folder, eval_metrics={"rising": Rising()}, **settings)

    run(tmp_path / "run", 2).train()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = run(tmp_path / "moved", 3)
    again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert again.weights_step == 1
    assert_same_weights(again.network, load_pipeline(tmp_path / "moved" / "checkpoint-1").transformer)
    shutil.rmtree(tmp_path / "moved" / "checkpoint-1")
    run(tmp_path / "moved", 4).train(resume_from_checkpoint=True)
    assert "checkpoint-1, which is not there" in caplog.text


def with_code(folder, executed):
    """Writes a pipeline whose classes are defined in its folder; its modules note when they are executed."""
    tiny_pipeline().save_pretrained(folder)
    package, note = Path(saving.__file__).parent, f"\nopen({str(executed)!r}, 'a').write(__name__ + ' ')\n"
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["mine", "MyPipeline"], "transformer": ["network", "SiTTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    source = (package / "pipelines" / "sit.py").read_text() + f"class MyPipeline(SiTPipeline): pass{note}"
    (folder / "mine.py").write_text(source)
    source = "from .first import x\nfrom .second import y\n" + (package / "models" / "sit.py").read_text() + note
    (folder / "transformer" / "network.py").write_text(source)
    (folder / "transformer" / "first.py").write_text(f"from .second import y as x{note}")
    (folder / "transformer" / "second.py").write_text(f"y = 1{note}")
    return folder


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """A folder of its own for diffusers' copies of modules."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "modules" / "diffusers_modules" / "local"


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_a_pipeline_with_code_of_its_own_is_saved_with_it_and_nothing_is_executed(tmp_path, modules, kind):
    base, executed = tmp_path / "base", tmp_path / "executed"
    with_code(base, executed)
    expected = {name: content for name, content in files(base).items() if name.endswith(".py")}
    assert len(expected) == 4
    trainer = trainer_of(kind, tmp_path / "run", load_pipeline(base, trust_remote_code=True))
    before = executed.read_text()
    assert len(before.split()) == 4
    for name in ("mine", "network", "first"):
        assert (modules / f"{name}.py").is_file()
        (modules / f"{name}.py").write_text("raise RuntimeError('of another model, with modules of the same names')")
    for folder in (tmp_path / "saved", base):  # over itself as well
        trainer.save_model(str(folder))
        assert {name: content for name, content in files(folder).items() if name.endswith(".py")} == expected
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pipeline(tmp_path / "saved")
    assert executed.read_text() == before
    loaded = load_pipeline(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded).__name__ == "MyPipeline" and executed.read_text() != before
    trainer.save_model()  # merges anew, if it merges
    assert_same_weights(loaded.transformer, load_pipeline(tmp_path / "run", trust_remote_code=True).transformer)
