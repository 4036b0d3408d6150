# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig

from tests.helpers import features, real_images, tiny_config, tiny_reward, tiny_trainer
from tests.runs import SAVE_EVERY_STEP, assert_same_weights, calls_of, first_gradients, logged, weights
from trl_distreward import FeatureStatistics, SubsetReplaceReward
from trl_distreward.generation import image_generators
from trl_distreward.trainer.estimators.gradients import has_gradient

BACKPROP = {
    "loss_type": "backprop",
    "reference_update": "rolling",
    "backprop_from": 0.75,
    "top_advantage_quantile": 1.0,
}


def backprop_trainer(folder, **kwargs):
    return tiny_trainer(folder, **{**BACKPROP, **kwargs})


def distance(rows, real):
    """Fréchet distance in float64, differentiable by autograd."""

    def moments(x):
        x = x.double()
        return x.mean(0), torch.cov(x.T)

    (mean, covariance), (real_mean, real_covariance) = moments(rows), moments(real)
    values, vectors = torch.linalg.eigh(real_covariance)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).sqrt().sum()
    return (mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace() - 2 * roots


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize(("steps", "checkpointed"), [(1, False), (3, True), (4, False)])
def test_update_is_the_gradient_of_the_whole_sets_distance(tmp_path, sampler, steps, checkpointed):
    """Compares with plain autograd through sampling, all features at once, and the distance of the updated set."""
    settings = {"backprop_from": steps / 4, "sampler": sampler, "checkpoint_steps": checkpointed}
    trainer = backprop_trainer(tmp_path, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **settings)
    sets = calls_of(trainer.rewards.of_sets[0], "set_reference")
    found = first_gradients(trainer)

    policy, network, args = trainer.policy, trainer.network, trainer.args
    network.zero_grad()
    slots = trainer.batch.rollout.slots.flatten()
    labels = trainer.conditions[slots]
    x = policy.noise(labels, generators := image_generators(args.seed, "rollout", 0, range(12)))
    cond, times = policy.encode(labels), args.rollout_schedule.times
    for i in range(args.num_inference_steps):
        with torch.set_grad_enabled(i >= args.num_inference_steps - steps):
            v = policy.velocity(network, x, torch.full((12,), times[i]), cond)
            dt, level = times[i + 1] - times[i], args.noise_level if sampler == "sde" else 0.0
            x = x + (v + level**2 * (x + (1 - times[i]) * v)) * dt  # the `sit` schedule
            if level and i < args.num_inference_steps - 1:  # the last step is the mean
                noise = torch.stack([torch.randn(1, 4, 4, generator=g) for g in generators])
                x = x + level * (2 * times[i] * -dt) ** 0.5 * noise
    images = policy.decode(x) * 255
    images = images + (images.round() - images).detach()
    old = sets[0][0][0]["features"].double()
    rows = old.index_copy(0, slots, features(images).double())
    (distance(rows, features(real_images())) * 24 / 12).backward()
    assert_gradients(found, gradients(network))


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_gradients(found, expected):
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5 * max(1, value.abs().max()))


def test_penalty_compares_velocities_where_the_samples_are(tmp_path):
    found = {}
    for beta in (0.0, 4.0):
        settings = {"beta": beta, "sampler": "ode", "learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
        trainer = backprop_trainer(tmp_path / str(beta), **settings)
        if beta:
            with torch.no_grad():
                for parameter in trainer.initial_model.parameters():
                    parameter.add_(0.2 * torch.ones_like(parameter))
        found[beta] = {name: value.clone() for name, value in first_gradients(trainer).items()}

    policy, network, args = trainer.policy, trainer.network, trainer.args
    network.zero_grad()
    labels = trainer.batch.rollout.conditions
    x, penalties = policy.noise(labels, image_generators(args.seed, "rollout", 0, range(12))), []
    cond, times = policy.encode(labels), args.rollout_schedule.times
    for i in range(args.num_inference_steps):
        v = policy.velocity(network, x, torch.full((12,), times[i]), cond)
        if i >= args.num_inference_steps - 3:
            with torch.no_grad():
                reference = policy.velocity(trainer.initial_model, x, torch.full((12,), times[i]), cond)
            penalties.append((v - reference).square().flatten(1).mean(1))
        x = (x + v * (times[i + 1] - times[i])).detach()
    (4.0 * torch.stack(penalties).mean()).backward()
    expected = gradients(network)
    assert_gradients({name: found[4.0][name] - found[0.0][name] for name in expected}, expected)


def held_for_backward(folder, **kwargs):
    """The most numbers that autograd keeps at once during an update."""
    trainer = backprop_trainer(folder, max_steps=1, per_device_train_batch_size=12, **kwargs)
    now, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor = tensor
            now += tensor.numel()
            most = max(most, now)

        def __del__(self):
            nonlocal now
            now -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        trainer.train()
    return most


def test_memory_grows_with_the_steps_gone_through_and_not_with_all_steps(tmp_path):
    few = held_for_backward(tmp_path, num_inference_steps=6, backprop_from=2 / 6)
    assert held_for_backward(tmp_path, num_inference_steps=24, backprop_from=2 / 24) <= 1.05 * few
    deep = held_for_backward(tmp_path, num_inference_steps=6, backprop_from=1.0)
    assert deep > 2 * few
    again = held_for_backward(tmp_path, num_inference_steps=6, backprop_from=1.0, checkpoint_steps=True)
    assert again < 0.6 * deep


def test_distances_fall(tmp_path):
    settings = {"learning_rate": 1e-2, "sampler": "ode", "backprop_from": 1.0, "num_eval_images": 200}
    trainer = backprop_trainer(tmp_path, max_steps=40, **settings)
    before = trainer.evaluate()["eval_ode_distance_features"]
    trainer.train()
    assert trainer.evaluate()["eval_ode_distance_features"] < 0.7 * before


@pytest.mark.parametrize(
    "settings",
    [
        {"reference_update": "refresh", "reference_refresh_steps": 2},
        {"ema_decay": 0.5, "sampler": "ode"},
        {"beta": 0.1, "checkpoint_steps": True},
        {"bf16": True},
        {"peft_config": LoraConfig(r=2), "beta": 0.1},
    ],
)
def test_modes_train_and_resume_exactly(tmp_path, settings):
    settings = {"max_steps": 3, **SAVE_EVERY_STEP, **settings}
    whole = backprop_trainer(tmp_path / "whole", **settings)
    start = weights(whole.network)
    whole.train()
    assert any(not torch.equal(p, start[name]) for name, p in whole.network.named_parameters())
    resumed = backprop_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(whole.network, resumed.network)
    assert logged(whole, "reward")[-1] == logged(resumed, "reward")[-1]
    kl = logged(whole, "kl")
    assert "beta" not in settings or (kl[0] == pytest.approx(0, abs=1e-12) and kl[-1] > 0)


def brightness(images, **kwargs):
    assert images.dtype in (torch.float32, torch.uint8) and images.max() > 1
    return images.float().flatten(1).mean(1) / 255


def test_differentiable_functions_of_single_images_are_maximized(tmp_path):
    trainer = backprop_trainer(tmp_path, reward_funcs=[brightness], max_steps=20, learning_rate=3e-3)
    trainer.train()
    values = logged(trainer, "reward")
    assert values[-1] > values[0] + 0.05
    assert logged(trainer, "loss") == pytest.approx([-v for v in values])


def test_loss_is_minus_the_weighted_reward_and_every_function_is_logged_by_name(tmp_path):
    def dark(images, **kwargs):
        return 2 - brightness(images)

    dark.__name__ = "brightness"
    rewards = {"reward_funcs": [tiny_reward(), brightness, dark], "reward_weights": [0.1, 100.0, 10.0]}
    trainer = backprop_trainer(tmp_path, max_steps=1, backprop_from=0.1, **rewards)
    trainer.train()
    names = ["subset_replace", "brightness", "brightness_2"]
    of_set, bright, dim = (logged(trainer, f"rewards/{name}/mean")[0] for name in names)
    reward = logged(trainer, "reward")[0]
    assert of_set < 0 < bright < 1 and dim == pytest.approx(2 - bright)
    assert reward == pytest.approx(0.1 * of_set + 100 * bright + 10 * dim)
    assert logged(trainer, "loss")[0] == pytest.approx(-reward, rel=1e-5)
    assert trainer.describe_run()["rewards"] == dict(zip(names, [0.1, 100.0, 10.0], strict=True))


@pytest.mark.parametrize("score", [lambda x: (x - 3.0).mean(1), lambda x: x.softmax(1)])
def test_a_gradient_is_found_where_scores_are_zero_or_have_a_fixed_sum(score):
    tracked = torch.tensor([[1.0, 2.0, 4.0, 5.0]] * 2, requires_grad=True)
    assert has_gradient(score(tracked), tracked) and not has_gradient(score(tracked.round()), tracked)


def listed(images, **kwargs):
    return [0.0] * len(images)


def blind(rounding):
    real = FeatureStatistics.from_features(features(real_images()))
    return SubsetReplaceReward(lambda images: features(rounding(images.float())), real)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (blind(torch.Tensor.byte), "'features' returned"),
        (blind(torch.round), "'features' returned"),
        (blind(torch.Tensor.detach), "'features' returned"),
        (listed, "'listed' returned .* must return a tensor"),
        (tiny_reward(credit="leave_one_in"), "set credit='shared'"),
        (tiny_reward(control_variate=True), "set credit='shared'"),
    ],
)
def test_rewards_without_a_gradient_are_refused(tmp_path, reward, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        backprop_trainer(tmp_path, reward_funcs=reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backprop_from": 1.5}, "backprop_from=1.5 must lie in"),
        ({"num_generations": 2}, "num_generations=2"),
        ({"num_subsets": 12}, "below reference_set_size=24"),
        ({"num_iterations": 2}, "num_iterations and best_of_n must be 1"),
        ({"reference_update": "refresh", "reference_refresh_steps": "auto"}, "a number of steps"),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **{**BACKPROP, **settings})


def test_guidance_is_back_propagated(tmp_path):
    plain, guided = (
        first_gradients(backprop_trainer(tmp_path, guidance_scale=scale, max_steps=1)) for scale in (1.0, 2.0)
    )
    assert any(not torch.allclose(plain[name], value) for name, value in guided.items())


@pytest.mark.parametrize(("start", "steps"), [(0.3, (3, 15)), (0.05, (1, 2)), (1.0, (10, 50)), (0.001, (1, 1))])
def test_the_same_time_goes_through_the_same_part_of_sampling_whatever_the_number_of_steps(tmp_path, start, steps):
    for count, expected in zip((10, 50), steps, strict=True):
        trainer = backprop_trainer(tmp_path, sampler="ode", num_inference_steps=count, backprop_from=start)
        assert trainer.estimator.num_passes() == 12 * expected
