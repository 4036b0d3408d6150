# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Code of the documentation and the short examples run as they are written. Models, networks, datasets and files that
they name are small stand-ins, and configurations are made small after they were checked.
"""

import re
import runpy
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMPipeline, DiffusionPipeline
from PIL import Image

import trl_distreward
from tests.clip import coloured, tiny_clip
from tests.docs_pages import DOCS, PAGES, ROOT, blocks, name_of
from tests.helpers import tiny_pipeline, tiny_reward, tiny_trainer, trained
from tests.hub_server import HubServer, connect
from tests.policies_parts import ddim, tokenizer
from tests.policies_tiny import ddim_pixels, dit, sd3, stable_diffusion, unet2d
from trl_distreward import (
    DiffusionDistributionConfig,
    FeatureStatistics,
    MergeCoefficientConfig,
    as_policy,
    load_pipeline,
)
from trl_distreward.metrics import CLIPEmbeddings
from trl_distreward.metrics.extractors import CallableFeatures
from trl_distreward.trainer.estimators import ESTIMATORS

PIPELINES = {
    "facebook/DiT-XL-2-256": dit,
    "google/ddpm-cifar10-32": ddim_pixels,
    "my-org/sit": lambda: tiny_pipeline(in_channels=3),
    "my-org/unet-cifar10": lambda: DDIMPipeline(unet2d(num_class_embeds=11), ddim()),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda: stable_diffusion(ddim()),
    "stabilityai/stable-diffusion-3.5-medium": sd3,
}
DATASETS = {"lambdalabs/naruto-blip-captions": ("image", "text"), "uoft-cs/cifar10": ("img", "label")}
EXAMPLES = ("class_conditional", "text_to_image_lora", "own_reward", "merge", "evaluate_folder")
SMALL = {
    "reference_set_size": 24,
    "num_subsets": 4,
    "replace_size": 2,
    "num_generations": 3,
    "num_inference_steps": 4,
    "max_steps": 2,
    "per_device_eval_batch_size": 16,
}


def thumbnails(images):
    """Stands for a feature network."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (B, 12)


def load_stand_in(name, **options):
    return PIPELINES[name]() if name in PIPELINES else load_pipeline(name, **options)


def load_small_dataset(name, split):
    image, other = DATASETS[name]
    pixels, prompts = coloured(30)
    conditions = prompts if other == "text" else [0] * 30
    return Dataset.from_dict(
        {image: [Image.fromarray(x.numpy()) for x in pixels.permute(0, 2, 3, 1)], other: conditions}
    )


def of_its_own_size(model, *args, height=None, width=None, **kwargs):
    return as_policy(model, *args, **kwargs)


def made_small(check):
    def post_init(config):
        config.use_cpu, config.report_to, config.disable_tqdm = True, "none", True
        check(config)  # the settings as they are written
        for name, most in SMALL.items():
            if hasattr(config, name):
                setattr(config, name, min(getattr(config, name), most))
        config.num_inference_steps_eval, config.num_eval_images = 4, 24
        check(config)

    return post_init


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place in ("trl_distreward", "trl_distreward.policies.loading"):
        monkeypatch.setattr(f"{place}.load_pipeline", load_stand_in)
    monkeypatch.setattr("datasets.load_dataset", load_small_dataset)
    monkeypatch.setattr(trl_distreward, "as_policy", of_its_own_size)
    for place in ("trl_distreward", "trl_distreward.rewards.per_image"):
        monkeypatch.setattr(f"{place}.load_clip", lambda *_, **__: CLIPEmbeddings(tiny_clip(), tokenizer()))
    monkeypatch.setattr(trl_distreward, "load_feature_extractor", partial(CallableFeatures, thumbnails))
    for config in (DiffusionDistributionConfig, MergeCoefficientConfig):
        monkeypatch.setattr(config, "__post_init__", made_small(config.__post_init__))
    for name in ("cifar10", "real", "dinov2", "joint"):
        FeatureStatistics.from_features(torch.rand(50, 12)).save(f"{name}.safetensors")
    np.savez("VIRTUAL_imagenet256_labeled.npz", mu=np.full(12, 0.5), sigma=np.eye(12))
    for name in ("real", "generated"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(coloured(12)[0].permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    for step in (350, 400, 450):
        tiny_pipeline(seed=step, in_channels=3).save_pretrained(f"run/checkpoint-{step}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands for the Hub, with the checkpoints of a run."""
    server = HubServer()
    connect(monkeypatch, server, tmp_path / "home")
    for step in (60, 80, 100):
        torch.manual_seed(step)
        ddim_pixels().save_pretrained(tmp_path / f"checkpoint-{step}")
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.glob("checkpoint-*/**/*.*")}
    server.add("my-org/ddpm-run", files)
    yield server
    server.shutdown()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_code_of_a_page_runs(page, stand_ins, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "reward_weighted", None)  # a page registers one; afterwards it is gone
    for text in blocks(page, "python"):
        exec(compile(text, name_of(page), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_short_example_runs(name, stand_ins, hub, tmp_path, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    saved = tmp_path / "outputs" / name
    if name == "evaluate_folder":
        assert "'recall': 1.0" in capsys.readouterr().out
    else:
        assert isinstance(DiffusionPipeline.from_pretrained(saved), DiffusionPipeline)
    assert ("my-org/ddpm-merged" in hub.repos) == (name == "merge")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_public_names_are_on_the_api_page():
    names = re.findall(r"^::: trl_distreward\.(\w+)", (DOCS / "reference" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(names) == trl_distreward.__all__


def test_options_are_those_of_the_configurations():
    page = runpy.run_path(str(DOCS / "configuration.py"))["page"]()
    assert (DOCS / "reference" / "configuration.md").read_text() == page, "run python docs/configuration.py"


def test_logged_names_are_logged(tmp_path):
    def preferred(images, **kwargs):
        return images.float().flatten(1).mean(1)

    trainer = tiny_trainer(tmp_path / "a", reward_funcs=[tiny_reward(), preferred], beta=0.1)
    trainer.train()
    trainer.evaluate()
    history = trainer.state.log_history
    for loss_type in ("rft", "transport"):
        history += trained(tmp_path / loss_type, loss_type=loss_type, top_advantage_quantile=1.0).state.log_history
    logged = {name for entry in history for name in entry} | {"skipped_updates"}
    table = (DOCS / "howto" / "troubleshooting.md").read_text().split("## ")[1]
    rows = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    for name in (name for row in rows for name in row):
        pattern = re.sub(r"…|\\{name\\}", ".+", re.escape(f"seconds{name}" if name.startswith("/") else name))
        assert any(re.fullmatch(pattern, value) for value in logged), f"{name} is not among {sorted(logged)}"
