# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import tiny_reward, tiny_trainer, trained
from tests.runs import assert_same_weights, calls_of, logged
from trl_distreward.generation import image_generators


def bright(images, **kwargs):
    return images.float().mean((1, 2, 3))


def test_best_of_n_keeps_the_candidate_that_is_best_by_itself(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, best_of_n=3)
    calls = calls_of(trainer.rewards.of_sets[0], "subset_rewards")
    trainer.train()
    *candidates, ((_, final), _) = calls
    features = torch.stack([new["features"] for (_, new), _ in candidates])  # (3, 12, d)
    assert len(features) == 3 and not torch.equal(features[0], features[1])
    best = torch.stack([alone for _, alone in candidates]).argmax(0)
    assert torch.equal(final["features"], features[best, torch.arange(12)])


def test_a_candidate_that_is_not_finite_is_not_the_best(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, best_of_n=2)
    once, scored = trainer.sampler._once, calls_of(trainer, "score")

    def first_is_broken(*args, first):
        rollout = once(*args, first=first)
        if first == 0:
            rollout.features[0]["features"][3] = rollout.sample[3] = torch.nan
            rollout.finite[3] = False
        return rollout

    trainer.sampler._once = first_is_broken
    trainer.train()
    (((rollout,), _),) = scored
    assert (
        rollout.finite.all() and rollout.sample.isfinite().all() and rollout.gathered[0]["features"].isfinite().all()
    )
    assert not logged(trainer, "skipped_updates")


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"sde_window": "sliding", "sde_window_interval": 2}, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        ({"sde_window": "random"}, None),
    ],
)
def test_noise_is_in_the_window_alone_and_only_its_steps_are_trained(tmp_path, settings, windows):
    settings = {"sde_window_size": 2, "num_inference_steps": 6, "learning_rate": 0.0, **settings}
    trainer = tiny_trainer(tmp_path, max_steps=4, **settings)
    scored = calls_of(trainer, "score")
    trainer.train()
    rollouts = [rollout for (rollout,), _ in scored]
    found = [rollout.schedule.sde_steps for rollout in rollouts]
    assert all(len(window) == 2 and rollout.steps == window for window, rollout in zip(found, rollouts, strict=True))
    assert found == windows or windows is None
    assert logged(trainer, "ratio/min") == [1.0] * 4
    # the path up to the window is the ODE's, by Euler's method
    policy, times, checked = trainer.policy, trainer.args.rollout_schedule.times, 0
    for step, rollout in enumerate(rollouts):
        x = policy.noise(rollout.conditions, image_generators(42, "rollout", step, range(12)))
        for i in range(rollout.steps[0]):
            velocity = policy.velocity(trainer.network, x, torch.full((12,), times[i]), rollout.cond)
            x = (x + velocity * (times[i + 1] - times[i])).detach()
            checked += 1
        torch.testing.assert_close(rollout.states[rollout.steps[0]], x, atol=1e-5, rtol=1e-4)
    assert checked > 0


@pytest.mark.parametrize("settings", [{}, {"loss_type": "rft"}, {"num_iterations": 2, "ratio_normalization": True}])
def test_states_in_cpu_memory_change_nothing(tmp_path, settings):
    expected = trained(tmp_path, max_steps=2, **settings)
    offloaded = trained(tmp_path, max_steps=2, offload_trajectories=True, **settings)
    assert_same_weights(offloaded.network, expected.network)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "backprop", "top_advantage_quantile": 1.0}])
def test_slices_are_decoded_and_judged_one_by_one_to_the_same_rewards(tmp_path, settings):
    logs = []
    for size, slices in ((None, [7, 5]), (2, [2, 2, 2, 1, 2, 2, 1])):  # images are generated 7 at a time
        trainer = tiny_trainer(tmp_path, max_steps=1, decode_batch_size=size, **settings)
        decoded = calls_of(trainer.policy, "decode")
        extracted = calls_of(trainer.rewards.of_sets[0], "extract")
        trainer.train()
        for calls in (decoded, extracted):  # after those of the reference set
            sizes = [len(args[0]) for args, _ in calls]
            assert any(sizes[i : i + len(slices)] == slices for i in range(len(sizes)))
        logs.append((logged(trainer, "reward"), logged(trainer, "reference_distance/features")))
    for whole, sliced in zip(*logs, strict=True):  # features of other batches differ by rounding
        assert whole == pytest.approx(sliced, rel=1e-6)


@pytest.mark.parametrize(("functions", "kept"), [([tiny_reward()], False), ([tiny_reward(), bright], True)])
def test_images_are_kept_only_for_functions_that_look_at_them(tmp_path, functions, kept):
    trainer = tiny_trainer(tmp_path, reward_funcs=functions)
    with torch.no_grad():
        rollout = trainer.estimator.rollout(trainer.network, torch.arange(12).view(6, 2), 0)
    assert (rollout.images is not None) == kept
