# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import features, tiny_pipeline, tiny_trainer, trained
from tests.runs import calls_of, logged
from trl_distreward.generation import generate_images
from trl_distreward.policies import as_policy


@pytest.mark.parametrize(
    ("settings", "refreshes"),
    [
        ({"reference_refresh_steps": 2}, 3),
        ({"reference_update": "rolling"}, 1),
        ({"reference_refresh_steps": "auto", "refresh_drift": 1e9}, 1),
        ({"reference_refresh_steps": "auto", "refresh_drift": 1e-9}, 5),
    ],
)
def test_refreshes_come_at_intervals_or_by_drift_and_a_rolling_set_needs_one(tmp_path, settings, refreshes):
    trainer = trained(tmp_path, max_steps=5, **settings)
    assert len(logged(trainer, "seconds/refresh")) == refreshes
    assert len(logged(trainer, "reference_drift")) == (0 if "reference_update" in settings else 5)


def test_drift_is_small_while_the_policy_stands_still_and_grows_when_it_moves(tmp_path):
    still, moving = (
        trained(tmp_path, max_steps=5, learning_rate=rate, num_subsets=12, reference_refresh_steps=100)
        for rate in (0.0, 3e-2)
    )
    assert max(logged(still, "reference_drift")) < 2.0 < max(logged(moving, "reference_drift"))


def test_a_rolling_set_holds_the_newest_image_of_every_place(tmp_path):
    trainer, newest = tiny_trainer(tmp_path, max_steps=2, reference_update="rolling"), {}
    rolled = calls_of(trainer.rewards.of_sets[0], "update_reference")
    trainer.train()  # 2 x 12 distinct slots of 24: every place is taken anew
    for (slots, spaces, _), _ in rolled:
        newest.update(zip(slots.flatten().tolist(), spaces["features"], strict=True))
    held = trainer.rewards.of_sets[0].features["features"]
    assert torch.equal(held, torch.stack([newest[slot] for slot in range(24)]))
    policy, schedule = as_policy(tiny_pipeline()), trainer.args.rollout_schedule
    (first,) = (images for images, _ in generate_images(policy, trainer.conditions, schedule, batch_size=24))
    assert not (held == features(first)).all(dim=1).any()


def test_an_image_that_is_not_finite_leaves_the_old_set_in_place(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, max_steps=4, reference_refresh_steps=2)
    refresh, sets = trainer.reference_set.refresh, []

    def broken(batches, step):
        batches = ((images, labels, valid, finite & (step == 0)) for images, labels, valid, finite in batches)
        refresh(batches, step)
        sets.append(trainer.rewards.of_sets[0].features["features"].clone())

    trainer.reference_set.refresh = broken
    trainer.train()
    assert len(sets) == 3 and torch.equal(sets[0], sets[-1])  # it is tried again at the next step
    assert "24 features of the new reference set are not finite: the old set stays" in caplog.text


def test_the_first_set_must_be_finite(tmp_path):
    trainer = tiny_trainer(tmp_path)
    decode = trainer.policy.decode
    trainer.policy.decode = lambda x: decode(x) * torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        trainer.train()
