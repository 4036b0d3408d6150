# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers import tiny_pipeline, tiny_trainer, trained
from tests.runs import calls_of, first_gradients, logged
from trl_distreward.sampling import transition
from trl_distreward.trainer.estimators.policy_gradient import clipped_policy_loss, gaussian_kl, normalize_ratio

# ---- the loss ----


def test_clipping_stops_the_gradient_only_beyond_the_range_and_in_the_direction_of_gain():
    delta = torch.tensor([2e-4, 2e-4, -2e-4, -2e-4, 5e-5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    result = clipped_policy_loss(delta, torch.zeros(5), advantages, epsilon=1e-4)
    result.loss.sum().backward()
    assert result.clipped.tolist() == [True, False, False, True, False]
    assert (delta.grad == 0).tolist() == [True, False, False, True, False]


def test_kl_is_that_of_two_gaussians():
    mean, reference, std = torch.randn(4, 10), torch.randn(4, 10), torch.rand(4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std[:, None]), normal(reference, std[:, None])).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)


def test_normalized_log_ratio_is_centred_and_on_one_scale_for_all_noise():
    """For samples of the old policy, the bias and the spread of 1/std are gone: Δμ·ε is left."""
    generator = torch.Generator().manual_seed(0)
    delta = 0.3 * torch.randn(1, 8, generator=generator, dtype=torch.float64).expand(50_000, 8)
    noise = torch.randn(50_000, 8, generator=generator, dtype=torch.float64)
    spreads = []
    for value in (0.05, 0.5):
        std, old_mean = torch.full((50_000,), value, dtype=torch.float64), torch.zeros_like(noise)
        sample, mean = old_mean + value * noise, old_mean + delta
        log_ratio = (-((sample - mean) ** 2) + (sample - old_mean) ** 2).mean(1) / (2 * value**2)
        assert log_ratio.mean() < -0.05
        normalized = normalize_ratio(log_ratio, mean, old_mean, std)
        torch.testing.assert_close(normalized, (delta * noise).mean(1))
        assert abs(normalized.mean()) < 5 * normalized.std() / 50_000**0.5
        spreads.append(normalized.std().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-9)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-3)])
def test_on_policy_ratio_is_exactly_one_even_with_label_dropout_configured(tmp_path, bf16, tolerance):
    trainer = trained(tmp_path, model=tiny_pipeline(class_dropout_prob=0.5), max_steps=2, bf16=bf16)
    assert trainer.model.training
    assert logged(trainer, "ratio/mean") == pytest.approx([1.0, 1.0], abs=1e-12)
    assert logged(trainer, "ratio/min") == logged(trainer, "ratio/max") == [1.0, 1.0]
    # the anchor is the value itself; the log-probabilities that the rollout drew are met as well
    assert max(logged(trainer, "delta_log_prob")) < tolerance
    assert logged(trainer, "clip_ratio") == [0.0, 0.0] and min(logged(trainer, "grad_norm")) > 0
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_steps_are_scored_with_the_noise_they_were_drawn_with(tmp_path):
    class Quieter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            level = 0.7 - 0.2 * state.global_step
            args.rollout_schedule = dataclasses.replace(args.rollout_schedule, noise_level=level)

    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Quieter())
    trainer.train()
    assert max(logged(trainer, "delta_log_prob")) < 1e-5


@pytest.mark.parametrize("kwargs", [{}, {"reference_update": "rolling", "replace_size": 1}])
def test_gradient_is_that_of_the_objective(tmp_path, kwargs):
    """Equation 6 written down again from the kept trajectories, in one piece."""
    trainer = tiny_trainer(tmp_path, max_steps=1, max_grad_norm=0, per_device_train_batch_size=1000, **kwargs)
    gradients, batch, fresh = first_gradients(trainer), trainer.batch, tiny_pipeline()
    model = fresh.transformer.train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    times, total, noise = trainer.args.rollout_schedule.times, 0, {"noise_schedule": "sit", "noise_level": 1.0}
    for step in batch.steps:
        x, taken = batch.states[step], batch.states[step + 1]
        velocity = fresh.predict_velocity(model, x, torch.full((len(x),), times[step]), batch.cond["class_labels"])
        score = transition(x, velocity, times[step], times[step + 1], prev_sample=taken, **noise)
        total = total - (score.log_prob * batch.advantages).mean() / len(batch.steps)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("ratio_normalization", [False, True])
def test_several_updates_of_a_rollout_are_anchored_on_the_first(tmp_path, ratio_normalization):
    settings = {"num_iterations": 2, "epsilon": 0.2, "ratio_normalization": ratio_normalization}
    trainer = trained(tmp_path, max_steps=4, **settings)
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    assert low[::2] + high[::2] == pytest.approx([1.0] * 4, abs=1e-6)
    assert low[1] < 1 - 1e-5 and high[1] > 1 + 1e-5
    assert len(logged(trainer, "reward")) == 2


def test_kl_is_zero_at_first_and_grows(tmp_path):
    trainer = trained(tmp_path, max_steps=3, beta=0.1, learning_rate=1e-2)
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-10) and kl[2] > 1e-5
    assert not any(p.requires_grad for p in trainer.initial_model.parameters())


def test_part_of_the_steps_is_drawn_anew_for_each_rollout(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=6, timestep_fraction=0.5, num_inference_steps=9)
    calls = calls_of(trainer, "score")
    trainer.train()
    steps = [rollout.steps for (rollout,), _ in calls]
    assert all(len(chosen) == 4 and max(chosen) < 8 for chosen in steps)
    assert len(set(steps)) > 1


def test_steps_may_be_weighted_by_their_noise(tmp_path):
    trainer = trained(tmp_path, step_weighting="noise")
    batch, times = trainer.batch, trainer.args.rollout_schedule.times
    micro, _ = next(batch.micro_batches(1000, 1))
    assert micro["weights"].sum().item() == pytest.approx(1.0)
    std = {i: (2 * times[i] * (times[i] - times[i + 1])) ** 0.5 for i in batch.steps}  # `sit` noise of level 1
    for i in batch.steps:
        share = micro["weights"][micro["t"] == times[i]] / micro["weights"].max()
        torch.testing.assert_close(share, torch.full_like(share, std[i] / max(std.values())))
