# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_trainer
from trl_distreward import LogSamplesCallback
from trl_distreward.trainer.callbacks import image_grid


def test_grid_puts_images_in_rows():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 3) * 10
    grid = np.asarray(image_grid(images, columns=4))
    assert grid.shape == (2 * 4, 4 * 5)
    for i in range(6):
        row, column = divmod(i, 4)
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


def test_a_sampler_that_is_not_evaluated_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_samplers=["sde"])
    with pytest.raises(ValueError, match="sampler='ode' is not evaluated: choose one of sde"):
        LogSamplesCallback(trainer)
