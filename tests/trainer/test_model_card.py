# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The model card says how the model was made, and its code runs."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig
from PIL import Image

from tests.helpers import tiny_config, tiny_merge_trainer, tiny_pipeline, tiny_pool, tiny_trainer, trained, two_spaces
from tests.policies_tiny import ddpm_classes, sd3
from tests.runs import SAVE_EVERY_STEP
from trl_distreward import DistributionRewardTrainer, LogSamplesCallback


def brightness(images, **kwargs):
    return images.float().mean(dim=(1, 2, 3)) / 255


def card_of(trainer):
    trainer.create_model_card()
    return Path(trainer.args.output_dir, "README.md").read_text()


def test_a_model_may_be_a_folder_and_the_card_names_no_path(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    trained(tmp_path / "run", model=str(tmp_path / "base"), max_steps=2, **SAVE_EVERY_STEP)
    assert (tmp_path / "run" / "checkpoint-2" / "model_index.json").is_file()
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in card


def test_the_card_of_a_merge_names_no_path(tmp_path):
    (tmp_path / "pool").mkdir()
    trainer = tiny_merge_trainer(tmp_path / "run", tiny_pool(tmp_path / "pool"))
    card = card_of(trainer)
    assert str(tmp_path) not in card and "| `pool/step-3.safetensors` |" in card
    assert "with the `MergeCoefficientTrainer` of trl-distreward: 0 updates of 4 trained numbers" in card


def test_the_card_tells_what_was_trained_and_by_which_reward(tmp_path):
    trainer = trained(tmp_path, reward_funcs=[two_spaces(), brightness], reward_weights=[2.0, 0.5])
    card = card_of(trainer)
    size = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    assert "from a `SiTPipeline` with the `DistributionRewardTrainer` of trl-distreward: 1 update" in card
    assert f" of {size:,} trained numbers" in card
    assert "| `subset_replace` | 2 | `features`: `features` | `FrechetDistance` | 1 |" in card
    assert "| `subset_replace` | 2 | `squares`: `<lambda>` | `FrechetDistance` | 1 |" in card
    assert "| `brightness` | 0.5 | single images |" in card


def snippet_of(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]


def image_of_the_snippet(card):
    """Runs the card's code in the current folder."""
    torch.manual_seed(0)
    exec(snippet_of(card), {})
    return np.asarray(Image.open("image.png"))


def test_the_code_of_the_card_loads_the_saved_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trained(tmp_path / "run", num_inference_steps_eval=3, guidance_scale=2.0)
    trainer.save_model()
    card = card_of(trainer)
    call = "class_labels=[0], num_inference_steps=3, guidance_scale=2.0"
    assert f'load_pipeline("run")\nimage = pipeline({call}).images[0]' in card
    torch.manual_seed(0)
    expected = trainer.policy.pipeline([0], num_inference_steps=3, guidance_scale=2.0).images[0]
    assert np.array_equal(image_of_the_snippet(card), np.asarray(expected))


def test_the_code_of_the_card_makes_an_image_where_diffusers_takes_no_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = tiny_trainer(tmp_path / "run", ddpm_classes(), brightness, last_step_size="auto", time_grid="auto")
    trainer.save_model()
    names = {}
    exec(snippet_of(card_of(trainer)), names)
    assert names["images"].shape == (1, 3, 4, 4)


def test_saving_writes_the_card_with_the_evaluations_before_and_after(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", max_steps=1)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert "| metric | step 0 | step 1 |" in (tmp_path / "run" / "README.md").read_text()


def adapted_sd3(peft_config):
    """A trainer in `org/adapted` of an adapter of `org/base`, which is saved too."""
    pipeline = sd3()
    pipeline.save_pretrained("org/base")
    pipeline.register_to_config(_name_or_path="org/base")
    args = tiny_config("org/adapted", hub_model_id="org/adapted", time_grid="auto", last_step_size=0)
    data = Dataset.from_dict({"prompt": ["a"] * 4})
    trainer = DistributionRewardTrainer(pipeline, brightness, args, data, peft_config=peft_config)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(
    "peft_config",
    [
        LoHaConfig(r=2, target_modules=["to_q"]),
        LoraConfig(r=2, target_modules=["to_q"], bias="lora_only"),
        LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["proj_out"]),
        LoraConfig(r=2, target_modules=[], target_parameters=["transformer_blocks.0.attn.to_q.weight"]),
    ],
)
def test_the_code_of_the_card_loads_the_merge_where_diffusers_cannot_load_the_adapter(
    tmp_path, monkeypatch, peft_config
):
    monkeypatch.chdir(tmp_path)
    code, names = snippet_of(card_of(adapted_sd3(peft_config))), {}
    assert 'from_pretrained("org/adapted")' in code
    exec(code, names)
    assert names["image"].size and not list(tmp_path.rglob("pytorch_lora_weights*"))


def test_the_code_of_the_card_loads_an_adapter_on_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = adapted_sd3(LoraConfig(r=2, target_modules=["to_q"]))
    with monkeypatch.context() as elsewhere:  # where org/base is a repository, and no folder
        elsewhere.chdir(tmp_path / "org")
        trainer.args.output_dir = str(tmp_path / "org" / "adapted")
        code = snippet_of(card_of(trainer))
    assert 'from_pretrained("org/base")\npipeline.load_lora_weights("org/adapted", subfolder="adapter"' in code
    names = {}
    exec(code, names)
    assert names["pipeline"].get_list_adapters() and names["image"].size


def test_the_card_shows_small_grids_of_samples(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.add_callback(LogSamplesCallback(trainer, freq=1))
    trainer.train()
    card = card_of(trainer)
    assert "![step-0](samples/step-0.png) ![step-1](samples/step-1.png)" in card
    (tmp_path / "samples" / "step-1.png").write_bytes(bytes(2**21))
    assert "samples/" not in card_of(trainer)


NASTY = "a|b `c` <script>\n# [x](y)"


def test_the_card_shows_names_from_outside_as_they_are(tmp_path):
    def named(images, **kwargs):
        return brightness(images)

    named.__name__ = NASTY
    trainer = tiny_trainer(tmp_path / NASTY[:13], reward_funcs=named, eval_metrics={NASTY: brightness}, run_name=NASTY)
    trainer.evaluate()
    (tmp_path / NASTY[:13] / "samples").mkdir(parents=True)
    (tmp_path / NASTY[:13] / "samples" / "step-last.png").touch()  # is none of the grids
    card = card_of(trainer).split("---", 2)[2]
    text = re.sub(r"```.*?```", "", card, flags=re.DOTALL)  # code blocks show all as it is
    outside = re.sub(r"`[^`\n]*`", "", text.replace("\\`", ""))
    assert "<script" not in outside.replace("\\<", "") and "[x](" not in outside
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) for lines in tables] == [1] * len(tables)
    assert sum("script" in line for lines in tables for line in lines) >= 2
    assert text.count("\n# ") == 1  # the title


@pytest.mark.parametrize("name", ['my "model"', "it's", "a\\b"])
def test_code_of_the_card_quotes_the_name(tmp_path, name):
    code = re.search(r"```python\n(.*?)```", card_of(tiny_trainer(tmp_path / name)), flags=re.DOTALL)[1]
    loaded = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert name in loaded
