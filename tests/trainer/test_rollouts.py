# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Each mode that one field of the configuration switches on."""

import pytest
import torch

from tests.helpers import features, logged, tiny_pipeline, tiny_reward, tiny_sit, tiny_trainer, tiny_vae, weights
from trl_distreward import SiTPipeline
from trl_distreward.conditions import take
from trl_distreward.generation import image_generators, sample
from trl_distreward.policies import as_policy, decode_uint8, to_uint8


def trained(tmp_path, **kwargs):
    trainer = tiny_trainer(tmp_path, **{"max_steps": 1, **kwargs})
    trainer.train()
    return trainer


def test_rejection_sampling_fits_the_selected_images(tmp_path):
    trainer = trained(tmp_path, loss_type="rft", max_grad_norm=0)
    batch = trainer._buffer
    assert batch.num_images == 6 and set(batch.states) == {0, 1}
    noise, data = batch.states[0], batch.states[1]
    assert 0 <= batch.times.min() and batch.times.max() <= 1 and len(batch.times.unique()) == 6
    fresh = tiny_pipeline()
    t = batch.times.view(-1, 1, 1, 1)
    with torch.no_grad():
        velocity = fresh.predict_velocity(
            fresh.transformer, (1 - t) * data + t * noise, batch.times, batch.cond["class_labels"]
        )
    expected = (velocity - (noise - data)).square().mean().item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)
    assert not logged(trainer, "ratio/mean")


def test_best_of_n_keeps_the_candidate_that_is_best_by_itself(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, best_of_n=3)
    seen, reward = {}, trainer.reward_funcs[0]
    score = reward.subset_rewards

    def spy(slots, new):
        seen.setdefault("calls", []).append((slots.clone(), new["features"].clone()))
        return score(slots, new)

    reward.subset_rewards = spy
    trainer.train()
    *candidates, (slots, final) = seen["calls"]
    assert len(candidates) == 3
    alone = torch.stack([score(s, {"features": f}) for s, f in candidates])  # (3, images)
    best = torch.stack([f for _, f in candidates])[alone.argmax(0), torch.arange(12)]
    assert torch.equal(final, best)
    assert not torch.equal(candidates[0][1], candidates[1][1])


@pytest.mark.parametrize(("window", "steps"), [("sliding", [(0, 1), (0, 1), (1, 2), (1, 2)]), ("random", None)])
def test_noise_only_in_the_window_and_only_its_steps_are_trained(tmp_path, window, steps):
    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        sde_window_size=2,
        sde_window=window,
        num_inference_steps=6,
        **({"sde_window_interval": 2} if window == "sliding" else {}),
    )
    seen, generate = [], trainer.rollouts.generate_once

    def spy(model, slots, step, first_index):
        batch, images = generate(model, slots, step, first_index)
        seen.append((trainer.rollouts.schedule(step).sde_steps, batch, slots.flatten()))
        return batch, images

    trainer.rollouts.generate_once = spy
    trainer.train()
    assert all(batch.steps == window and len(window) == 2 for window, batch, _ in seen)
    if steps is not None:
        assert [window for window, _, _ in seen] == steps
    # before the window the path is the ODE's: the state at its start is the noise's Euler solution
    window, batch, slots = seen[2]
    if window[0] > 0:
        policy = trainer.policy.__class__(tiny_pipeline())
        times = trainer.args.rollout_schedule.times
        x = policy.noise(slots, image_generators(42, "rollout", 2, range(12)))
        for i in range(window[0]):
            t = torch.full((12,), times[i])
            cond = policy.encode(take(trainer.conditions, slots))
            x = x + policy.velocity(trainer.network, x, t, cond) * (times[i + 1] - times[i])
        assert (batch.states[window[0]] - x).abs().max() < 0.2  # the network has since made an update or two
    assert logged(trainer, "ratio/min") == [1.0] * 4


def test_share_of_steps_is_drawn_anew(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=6, timestep_fraction=0.5, num_inference_steps=9)
    steps, generate = [], trainer.rollouts.generate_once

    def spy(*args, **kwargs):
        batch, images = generate(*args, **kwargs)
        steps.append(batch.steps)
        return batch, images

    trainer.rollouts.generate_once = spy
    trainer.train()
    assert all(len(chosen) == 4 and max(chosen) < 8 for chosen in steps)
    assert len(set(steps)) > 1


def test_noise_weighted_steps(tmp_path):
    trainer = trained(tmp_path, step_weighting="noise")
    batch, times = trainer._buffer, trainer.args.rollout_schedule.times
    micro, _ = next(
        batch.micro_batches(times, 1000, 1, trainer.pair_loss.step_weights(batch.steps, batch.advantages.device))
    )
    assert micro["weights"].sum().item() == pytest.approx(1.0)
    std = {i: (2 * times[i] * (times[i] - times[i + 1])) ** 0.5 for i in batch.steps}  # sit noise, level 1
    for i in batch.steps:
        rows = micro["t"] == times[i]
        share = micro["weights"][rows] / micro["weights"].max()
        torch.testing.assert_close(share, torch.full_like(share, std[i] / max(std.values())))


def test_ratio_normalization_is_one_on_policy_and_bounded_after(tmp_path):
    trainer = trained(tmp_path, max_steps=4, num_iterations=2, ratio_normalization=True, epsilon=0.2)
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    assert low[0] == pytest.approx(1.0, abs=1e-6) == high[0]
    assert low[1] < 1 < high[1]


def test_several_rewards_summed_before_or_after_normalization(tmp_path):
    def big(images, **kwargs):
        return images.double().mean((1, 2, 3)) * 100

    rewards = [torch.tensor([[1.0], [2.0], [4.0]]).double(), torch.tensor([[500.0], [100.0], [0.0]]).double()]
    kwargs = {"num_subsets": 3, "reward_weights": [1.0, 0.5]}
    summed = tiny_trainer(tmp_path, reward_funcs=[tiny_reward(), big], **kwargs)
    summed.reward_funcs[0].set_reference(summed.reward_funcs[0].extract(torch.zeros(4, 1, 4, 4, dtype=torch.uint8)))
    advantages = summed._advantages(rewards)
    assert advantages.argmax() == 0  # the large reward drowns the other
    args = {**kwargs, "multi_objective_aggregation": "normalize_then_sum"}
    each = tiny_trainer(tmp_path, reward_funcs=[tiny_reward(), big], **args)
    each.reward_funcs[0].set_reference(summed.reward_funcs[0].features)
    advantages = each._advantages(rewards)
    expected = sum(w * (r - r.mean()) / r.std() for w, r in zip([1.0, 0.5], rewards, strict=True))
    torch.testing.assert_close(advantages, expected)
    assert advantages.argmax() == 2


def test_sample_wise_rewards_alone_train_without_a_reference_set(tmp_path):
    def brightness(images, **kwargs):
        return images.float().mean((1, 2, 3))

    trainer = trained(
        tmp_path, reward_funcs=brightness, max_steps=30, learning_rate=3e-3, num_subsets=24, num_inference_steps=6
    )
    assert not logged(trainer, "seconds/refresh")
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 10


def test_offloaded_trajectories_change_nothing(tmp_path):
    expected = weights(trained(tmp_path).network)
    trainer = trained(tmp_path, offload_trajectories=True)
    assert all(torch.equal(expected[name], value) for name, value in weights(trainer.network).items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    expected = weights(trained(tmp_path).network)
    trainer = trained(tmp_path, activation_checkpointing=True)
    assert trainer.network.is_gradient_checkpointing
    assert all(torch.equal(expected[name], value) for name, value in weights(trainer.network).items())


def test_bfloat16_keeps_the_first_ratio_at_exactly_one(tmp_path):
    trainer = trained(tmp_path, bf16=True, max_steps=2)
    assert logged(trainer, "ratio/min") == logged(trainer, "ratio/max") == [1.0, 1.0]
    assert logged(trainer, "clip_ratio") == [0.0, 0.0]
    assert max(logged(trainer, "delta_log_prob")) < 1e-3 and min(logged(trainer, "grad_norm")) > 0
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    other = trained(tmp_path, max_steps=2)  # autocast was on: float32 gives other weights
    pairs = zip(trainer.network.parameters(), other.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_change_of_log_prob_is_logged_for_every_step(tmp_path):
    trainer = trained(tmp_path, max_steps=2, num_iterations=2, epsilon=0.2, learning_rate=1e-2, log_steps=True)
    for update in (0, 1):
        by_step = [logged(trainer, f"delta_log_prob/step_{i}")[update] for i in range(3)]
        assert sum(by_step) / 3 == pytest.approx(logged(trainer, "delta_log_prob")[update], rel=1e-5, abs=1e-9)
    assert min(by_step) > 1e-5 and len(set(by_step)) == 3
    assert not logged(trainer, "delta_log_prob/step_3")  # the noiseless last step is not trained


def test_automatic_refresh_waits_for_drift(tmp_path):
    kwargs = {"max_steps": 6, "reference_refresh_steps": "auto"}
    never = trained(tmp_path, refresh_drift=1e9, **kwargs)
    always = trained(tmp_path, refresh_drift=1e-9, **kwargs)
    assert len(logged(never, "seconds/refresh")) == 1 and len(logged(always, "seconds/refresh")) == 6
    assert len(logged(never, "reference_drift")) == 6


def test_drift_is_small_while_the_policy_stands_still_and_grows_when_it_moves(tmp_path):
    still = trained(tmp_path, max_steps=5, learning_rate=0.0, num_subsets=12, reference_refresh_steps=100)
    moving = trained(tmp_path, max_steps=5, learning_rate=3e-2, num_subsets=12, reference_refresh_steps=100)
    assert max(logged(still, "reference_drift")) < 2.0  # the default threshold
    assert max(logged(moving, "reference_drift")) > 2.0


def test_bad_features_skip_the_update_keep_its_context_and_stop_a_hopeless_run(tmp_path):
    broken = {"from": None}

    def extractor(images):
        values = features(images)
        if broken["from"] is not None:
            values[0] = float("nan")
        return values

    reward = tiny_reward()
    reward.extractors["features"] = extractor
    trainer = tiny_trainer(
        tmp_path, reward_funcs=reward, max_steps=9, max_skipped_updates=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    broken["from"] = 0
    before = weights(trainer.network)
    trainer.args.max_steps = 20
    with pytest.raises(RuntimeError, match=r"3 updates in a row .*not finite.*checkpoint-\d+"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer.network).items())
    context = torch.load(sorted((tmp_path / "skipped").iterdir())[0], weights_only=True)
    assert "features are not finite" in context["reason"] and context["slots"].shape == (6, 2)
    with pytest.raises(RuntimeError, match="3 updates in a row"):  # counted from the training's beginning
        trainer.train(resume_from_checkpoint=True)


def test_black_images_of_a_diverged_sampler_are_not_taken_for_images(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, reference_update="rolling")
    velocity = trainer.policy.velocity

    def broken(model, x, t, cond):
        value = velocity(model, x, t, cond)
        return value * float("nan") if trainer.state.global_step == 1 else value

    trainer.policy.velocity = broken
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0]
    assert trainer.reward_funcs[0].features["features"].isfinite().all()
    trainer.state.global_step = 1
    with pytest.raises(ValueError, match="samples are not finite"):
        trainer.evaluate()


def test_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    loss = trainer.compute_loss

    def broken(model, inputs, **kwargs):
        value = loss(model, inputs, **kwargs)
        return value * float("nan") if trainer.state.global_step == 1 else value

    trainer.compute_loss = broken
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    assert logged(trainer, "skipped_updates") == [1.0]


@pytest.mark.parametrize("scale, noted", [(3e38, "overflows in float16"), (0.5, "is not finite")])
def test_steps_that_a_scaler_of_gradients_skips_are_counted(tmp_path, scale, noted):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-30)
    loss = trainer.compute_loss
    factor = 1e6 if scale > 1 else float("nan")  # it is the scale that overflows, or not

    def large(model, inputs, **kwargs):
        return loss(model, inputs, **kwargs) * (factor if trainer.state.global_step == 0 else 1)

    trainer.compute_loss = large
    before = weights(trainer.network)
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1.0]
    assert [entry["step"] for entry in trainer.run_record.skipped] == [0]
    assert noted in trainer.run_record.skipped[0]["reason"]
    after = weights(trainer.network)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())


def test_rollout_images_do_not_depend_on_the_batch_they_are_drawn_in(tmp_path):
    trainer = tiny_trainer(tmp_path)
    slots = torch.arange(12).view(6, 2)
    trainer.rollouts.judge.keep_images = True
    images = trainer.rollouts.generate(trainer.network, slots, step=0)[1].images
    schedule, conditions = trainer.args.rollout_schedule, take(trainer.conditions, torch.tensor([5]))
    generators = image_generators(42, "rollout", 0, [5])
    alone = sample(trainer.policy, trainer.network, conditions, schedule, generators).sample
    assert (to_uint8(trainer.policy.decode(alone)).int() - images[5].int()).abs().max() <= 1


@pytest.mark.parametrize("reward", [{"credit": "leave_one_in"}, {"control_variate": True}])
def test_credits_train_and_their_spread_is_told(tmp_path, reward):
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=tiny_reward(**reward),
        max_steps=3,
        reference_refresh_steps=2,
        log_reward_diagnostics=True,
    )
    seen = []
    advantages = trainer._advantages
    trainer._advantages = lambda rewards: seen.append(rewards[0].shape) or advantages(rewards)
    trainer.train()
    assert seen == [torch.Size([6, 2 if "credit" in reward else 1])] * 3
    told = [{key.split("/")[0] for key in e if key.startswith("reward_")} for e in trainer.state.log_history]
    assert [bool("reward_placebo" in keys) for keys in told[:3]] == [True, False, True]  # of a new reference set
    assert "reward_diagnostics" in told[1]


@pytest.mark.parametrize("settings", [{}, {"loss_type": "backprop", "top_advantage_quantile": 1.0}])
def test_samples_are_decoded_in_slices_to_the_same_images(tmp_path, settings):
    logs = []
    for size in (None, 2):
        trainer = tiny_trainer(tmp_path, max_steps=1, decode_batch_size=size, **settings)
        sizes, decode = [], trainer.policy.decode

        def spy(x, sizes=sizes, decode=decode):
            if not torch.is_grad_enabled():
                sizes.append(len(x))
            return decode(x)

        trainer.policy.decode = spy
        trainer.train()
        assert max(sizes) == (size or 7)
        logs.append((logged(trainer, "reward"), logged(trainer, "reference_distance/features")))
    for whole, sliced in zip(*logs, strict=True):  # features of other batches differ by rounding
        assert whole == pytest.approx(sliced, rel=1e-6)


def test_slices_must_have_an_image(tmp_path):
    with pytest.raises(ValueError, match="decode_batch_size=0 must be at least 1"):
        tiny_trainer(tmp_path, decode_batch_size=0)


def test_a_vae_decodes_slices_as_it_does_the_whole():
    policy = as_policy(SiTPipeline(tiny_sit(in_channels=4, sample_size=8), tiny_vae()))
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, slices = (decode_uint8(policy, x, size)[0].int() for size in (None, 2))
    assert whole.shape == (5, 3, 16, 16) and (whole - slices).abs().max() <= 1
