# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PrinterCallback

from tests.helpers import tiny_merge_trainer, tiny_pipeline, tiny_trainer
from tests.runs import EVALUATE_EVERY_STEP, logged
from trl_distreward import LogSamplesCallback
from trl_distreward.trainer.callbacks import ShowProgress, image_grid


def test_grid_puts_images_in_rows():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 3) * 10
    grid = np.asarray(image_grid(images))
    assert grid.shape == (2 * 4, 3 * 5)
    for i in range(6):
        row, column = divmod(i, 3)
        assert (grid[row * 4 + 1 : row * 4 + 3, column * 5 + 1 : column * 5 + 4] == i * 10).all()
    assert image_grid(images.expand(6, 3, 2, 3)).mode == "RGB"


def test_samples_come_from_the_same_noise_and_the_evaluated_weights(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = tiny_trainer(
        tmp_path, max_steps=4, ema_decay=0.9, learning_rate=1e-2, report_to="tensorboard", rollout_batch_size=4
    )
    trainer.add_callback(LogSamplesCallback(trainer, freq=2))
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.train()
    grids = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "samples").iterdir()}
    assert set(grids) == {"step-0", "step-2", "step-4"}
    change = np.abs(grids["step-4"] - grids["step-0"]).mean()
    assert 0 < change < 60  # the same images, a little changed
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.network.parameters(), strict=True))
    assert any(path.name.startswith("events") for path in tmp_path.rglob("*"))


def test_a_grid_that_cannot_be_made_does_not_end_training(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.add_callback(LogSamplesCallback(trainer, freq=2))
    decode = trainer.policy.decode
    trainer.policy.decode = lambda x: decode(x) * (torch.nan if trainer.state.global_step == 2 else 1)
    trainer.train()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-0.png"]
    assert "There is no grid of samples at step 2: an image is not finite" in caplog.text


def test_samples_are_logged_by_default_under_the_ode_if_it_is_evaluated(tmp_path):
    for samplers, expected in ((["sde", "ode"], "ode"), (["sde"], "sde")):
        trainer = tiny_trainer(tmp_path / expected, max_steps=1, log_samples=True, eval_samplers=samplers)
        (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, LogSamplesCallback))
        assert callback.schedule.sampler == expected
        trainer.train()
        assert {path.name for path in (tmp_path / expected / "samples").iterdir()} == {"step-0.png", "step-1.png"}
    own = LogSamplesCallback(trainer, freq=3)
    trainer.add_callback(own)  # takes the place of the default
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, LogSamplesCallback)] == [own]
    tiny_trainer(tmp_path / "none", max_steps=1, log_samples=False).train()
    assert not (tmp_path / "none" / "samples").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_grids_with_their_step(tmp_path, monkeypatch, name):
    sent: list[dict] = []
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Image=lambda grid: grid.size, log=sent.append))
    trainer = tiny_trainer(tmp_path, max_steps=2, log_samples=True, save_steps=2)
    trainer.args.report_to = [name]
    trainer.train()
    assert [(set(each), each["train/global_step"]) for each in sent] == [
        ({"samples", "train/global_step"}, step) for step in (0, 2)
    ]


@pytest.mark.parametrize("kind", [tiny_trainer, tiny_merge_trainer])
def test_a_log_is_a_line_for_people_and_whole_for_trackers(tmp_path, capsys, kind):
    trainer = kind(tmp_path, max_steps=2, **EVALUATE_EVERY_STEP)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    if kind is tiny_merge_trainer:  # says how good the merges are on fresh noise
        assert "final_reward/learnt" in lines.pop()
    assert len(lines) == 5 and all(len(line) < 160 for line in lines)  # two updates, two evaluations, the end
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 1", "step 2", "step 2", "step 2"]
    first = trainer.state.log_history[0]
    for name in ("reward", "reward_std", "loss", "learning_rate"):
        assert f"  {name} {first[name]:.4g}  " in lines[0]
    assert "  seconds " in lines[0] and "grad_norm" not in lines[0] and "grad_norm" in first
    assert f"  eval_ode_distance_features {logged(trainer, 'eval_ode_distance_features')[0]:.4g}" in lines[1]
    assert "train_runtime" in lines[-1]


def test_a_bar_shows_reward_distance_and_seconds_of_an_update(tmp_path, capsys):
    tiny_trainer(tmp_path, max_steps=2, disable_tqdm=False).train()
    shown = capsys.readouterr().err
    last = shown[shown.rindex("Training:") :]
    assert "2/2" in last and "reference_distance/features=" in last and "reward=" in last and "seconds=" in last
    assert "Reference set" in shown


def test_the_user_may_choose_another_way_to_show_progress(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.remove_callback(ShowProgress)
    trainer.train()
    assert capsys.readouterr().out == ""
    trainer.add_callback(PrinterCallback())
    trainer.train()
    assert "'grad_norm'" in capsys.readouterr().out


def blind(images, **kwargs):
    return [1.0] * len(images)


def frozen(trainer):
    """Lets no gradient reach the weights."""
    for parameter in trainer.network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


@pytest.mark.parametrize(
    ("settings", "change", "warned"),
    [
        ({}, None, None),
        ({"max_steps": 2, "max_grad_norm": 1e-6}, None, None),  # too few to say so
        ({"max_steps": 11, "max_grad_norm": 1e-6}, None, "Nearly all gradients are longer than max_grad_norm=1e-06"),
        ({"learning_rate": 0.0}, None, "The last 3 updates changed nothing, as the learning rate is 0"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10**9, "learning_rate": 1e-9},
            None,
            "rounding",
        ),
        ({"learning_rate": 1e-30, "max_steps": 12}, None, "The last 10 updates changed nothing, as changes are lost"),
        ({"reward_funcs": blind, "weight_decay": 0.1}, None, "changed nothing, as they were skipped"),
        ({"weight_decay": 0.1}, frozen, "changed nothing, as all gradients are 0"),  # though weights decay
    ],
)
def test_runs_that_learn_nothing_say_so_once(tmp_path, caplog, settings, change, warned):
    trainer = tiny_trainer(tmp_path, **{"max_steps": 3, **settings})
    if change is not None:
        change(trainer)
    trainer.train()
    said = [r.message for r in caplog.records if r.name.endswith("callbacks")]
    assert len(said) == (warned is not None) and (warned or "") in "".join(said)


def test_a_search_has_no_gradient_to_warn_of(tmp_path, caplog):
    tiny_merge_trainer(tmp_path, method="cma").train()
    assert "changed nothing" not in caplog.text


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        tiny_trainer(tmp_path, pipeline)
