# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import tiny_config, tiny_pipeline, trained
from tests.runs import logged


def test_rejection_sampling_fits_the_selected_images(tmp_path):
    trainer = trained(tmp_path, loss_type="rft", max_grad_norm=0)
    batch, fresh = trainer.batch, tiny_pipeline()
    assert batch.num_images == 6 and set(batch.states) == {0, 1}
    noise, data, t = batch.states[0], batch.states[1], batch.times.view(-1, 1, 1, 1)
    assert 0 <= batch.times.min() and batch.times.max() <= 1 and len(batch.times.unique()) == 6
    with torch.no_grad():
        velocity = fresh.predict_velocity(
            fresh.transformer, (1 - t) * data + t * noise, batch.times, batch.cond["class_labels"]
        )
    expected = (velocity - (noise - data)).square().mean().item()
    for name in ("loss", "flow_matching_loss"):
        assert logged(trainer, name)[0] == pytest.approx(expected, rel=1e-4)
    assert not logged(trainer, "ratio/mean")


@pytest.mark.parametrize("settings", [{"num_iterations": 2}, {"beta": 0.1}])
def test_contradicting_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="loss_type='rft' has no probability ratio and no KL"):
        tiny_config(tmp_path, loss_type="rft", **settings)
