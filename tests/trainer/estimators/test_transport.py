# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import TrainerCallback

from tests.helpers import QUIET, features, real_images, tiny_reward, tiny_trainer, trained
from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    SubsetReplaceReward,
    frechet_distance,
)
from trl_distreward.generation import SamplingSchedule, sample

TRANSPORT = {"loss_type": "transport", "sampler": "auto", "reference_update": "rolling", "top_advantage_quantile": 1.0}


class Correction(nn.Module):
    """An affine correction of a velocity `(P, d)` for each of 20 equal parts of time; 0 at the start."""

    def __init__(self, dimension):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(20, dimension, dimension))
        self.bias = nn.Parameter(torch.zeros(20, dimension))

    def forward(self, x, t):
        part = (t * 20).long().clamp(max=19)
        return torch.einsum("pij,pj->pi", self.gain[part], x) + self.bias[part]


class GaussianPolicy:
    """Samples of d independent Gaussians as images of d pixels, by their exact velocity plus a trained correction."""

    num_conditions = 1

    def to(self, device):
        pass

    def save_pretrained(self, path, model=None):
        raise NotImplementedError

    read_weights = save_pretrained

    def __init__(self, mean, std):
        self.mean, self.std, self.model = mean, std, Correction(len(mean))

    def check_conditions(self, conditions):
        pass

    def encode(self, conditions):
        return {"class_labels": torch.as_tensor(conditions)}

    def noise(self, conditions, generator=None):
        return torch.stack([torch.randn(len(self.mean), generator=g) for g in generator])

    def velocity(self, model, x, t, cond):
        t = t[:, None]
        variance = (1 - t) ** 2 * self.std**2 + t**2
        slope = (t - (1 - t) * self.std**2) / variance  # of E[x_1 - x_0 | x_t] in x_t
        return slope * (x - (1 - t) * self.mean) - self.mean + model(x, t[:, 0])

    def decode(self, x):
        return (x / 2 + 0.5).clamp(0, 1).view(len(x), 1, 1, -1)


def pixels(images):
    return images.flatten(1).float() / 127.5 - 1


MEAN, STD = torch.tensor([0.2, -0.1, 0.2]), torch.tensor([0.25, 0.15, 1e-3])
REAL_MEAN, REAL_STD = torch.tensor([0.1, 0.1, 0.0]), torch.tensor([0.15, 0.2, 1e-3])
REAL = FeatureStatistics.from_moments(REAL_MEAN, torch.diag(REAL_STD**2), 10_000)


def gaussian_trainer(folder, **settings):
    """Two pixels that vary in the samples, and a third that does not, like a texture that fools a network."""
    sizes = {"reference_set_size": 1000, "num_subsets": 400, "replace_size": 1, "num_train_timesteps": 4}
    rates = {"learning_rate": 1e-2, "max_grad_norm": 0, "ema_decay": 0.0, "transport_size": 0.05}
    batches = {"per_device_train_batch_size": 2000, "per_device_eval_batch_size": 500, "num_inference_steps": 20}
    settings = {**TRANSPORT, "transport_advantage": 0.0, **sizes, **rates, **batches, **QUIET, **settings}
    return DistributionRewardTrainer(
        model=GaussianPolicy(MEAN, STD),
        reward_funcs=SubsetReplaceReward(pixels, REAL),
        args=DiffusionDistributionConfig(output_dir=str(folder), **settings),
    )


def samples_of(trainer, count=4000):
    policy, conditions = trainer.policy, torch.zeros(count, dtype=torch.long)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return sample(policy, policy.model, conditions, SamplingSchedule(20, "ode"), generators).sample


def test_displacement_is_the_gradient_of_the_updated_set_by_each_sample(tmp_path):
    trainer = trained(tmp_path, **TRANSPORT, learning_rate=0.0, transport_size=0.3)
    batch, reward = trainer.batch, trainer.rewards.of_sets[0]
    reference = reward.features["features"].double()  # has rolled on: all new images stand in it
    x = batch.sample.double().requires_grad_()
    images = (x / 2 + 0.5).clamp(0, 1) * 255
    new = features(images).double()
    places = torch.cdist(new, reference).argmin(1)
    assert len(places.unique()) == 12
    whole = reference.index_copy(0, places, new)
    real = FeatureStatistics.from_features(features(real_images()))
    distance = closed_form(whole, real)
    gradient = torch.autograd.grad(distance, x)[0]
    inside = (images.detach() > 1) & (images.detach() < 254)
    expected = -gradient / gradient.square().mean().sqrt() * 0.3
    assert inside.float().mean() > 0.3
    found = batch.displacement.double()
    assert found.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)
    scale = (found[inside] * expected[inside]).sum() / expected[inside].square().sum()
    torch.testing.assert_close(found[inside], scale * expected[inside], atol=3e-3, rtol=0.05)


def closed_form(x, real):
    """The Fréchet distance of features `(N, d)`, float64, from statistics, with a gradient."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    root = real.covariance.double()
    values, vectors = torch.linalg.eigh(root)
    half = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(half @ covariance @ half).clamp(min=1e-12).sqrt().sum()
    return (x.mean(0) - real.mean.double()).square().sum() + covariance.trace() + root.trace() - 2 * cross


def test_a_rollout_is_moved_along_the_wasserstein_gradient_where_samples_vary(tmp_path):
    """
    The regression's minimiser is known for Gaussians. With displacements `K (x - mean) + e`, it moves the mean by
    `e ∫ σ/σ_t dt` and the logarithm of the spread by `K ∫ (1-t) σ²/σ_t² dt`, where `σ_t² = (1-t)² σ² + t²`.
    """
    trainer = gaussian_trainer(tmp_path, max_steps=100, num_iterations=100)
    before = samples_of(trainer)
    trainer.train()
    after, batch = samples_of(trainer), trainer.batch
    gain = (REAL_STD / STD - 1)[:2]  # the gradient flow moves x to real_mean + real_std / std (x - mean)
    flow = torch.cat([gain, torch.zeros(1)]) * (batch.sample - MEAN) + REAL_MEAN - MEAN
    assert cosine_similarity(batch.displacement.flatten(), flow.flatten(), dim=0) > 0.98
    scale = 0.05 / flow.square().mean().sqrt()
    t = (torch.arange(1000) + 0.5)[:, None] / 1000
    marginal = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    mean_shift = scale * (REAL_MEAN - MEAN) * (STD / marginal).mean(0)
    log_spread = scale * gain * ((1 - t) * STD**2 / marginal**2).mean(0)[:2]
    torch.testing.assert_close(after.mean(0) - before.mean(0), mean_shift, atol=4e-3, rtol=0.1)
    torch.testing.assert_close((after.std(0) / before.std(0)).log()[:2], log_spread, atol=1e-2, rtol=0.15)
    displaced = batch.displacement.mean(0)
    assert (after.mean(0) - before.mean(0))[2].abs() < 0.1 * displaced[2].abs() > 1e-3


def test_the_distance_falls_from_rollout_to_rollout_if_steps_are_small(tmp_path):
    trainer, distances = gaussian_trainer(tmp_path, max_steps=60, num_iterations=10), []

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % 10 == 0:
                distances.append(frechet_distance(FeatureStatistics.from_features(samples_of(trainer)), REAL))

    trainer.add_callback(Measure())
    trainer.train()
    assert len(distances) == 6 and all(later < earlier for earlier, later in pairwise(distances)), distances
    assert distances[-1] < 0.7 * distances[0]


def brightness(images, **kwargs):
    return images.float().mean((1, 2, 3)) / 255


def rounded(images, **kwargs):
    return images.float().mean((1, 2, 3)).round().tolist()


def test_rewards_of_images_move_them_too_and_without_a_gradient_pull(tmp_path):
    def displaced(*rewards, **settings):
        trainer = trained(tmp_path, reward_funcs=list(rewards), **TRANSPORT, learning_rate=0.0, **settings)
        return trainer.batch.displacement, trainer.batch.advantages

    bright, _ = displaced(brightness)
    assert (bright >= 0).all() and bright.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)
    alone, _ = displaced(tiny_reward())
    both, _ = displaced(tiny_reward(), brightness)
    assert not torch.equal(both, alone) and both.mean() > alone.mean()
    beside, advantages = displaced(tiny_reward(), rounded, transport_advantage=1.0)
    torch.testing.assert_close(beside, alone / 2)  # half of the weights
    assert advantages.std() > 0.1
    with pytest.raises(ValueError, match="'rounded' does not move images .*: set transport_advantage"):
        displaced(tiny_reward(), rounded)


def features_by_numpy(images):
    return torch.from_numpy(features(images).numpy())


def by_numpy(images, **kwargs):
    return images.numpy().mean((1, 2, 3))  # an error for images with a gradient


async def by_coroutine(images, **kwargs):
    return images.float().mean((1, 2, 3))


def by_dtype(images, **kwargs):
    return (images / 255 if images.dtype == torch.uint8 else images).mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (by_numpy, "'by_numpy' does not move images .*numpy"),
        (by_coroutine, "'by_coroutine' does not move images .*no gradient"),
        (by_dtype, "'by_dtype' does not move images .*must not depend on the dtype"),
        (
            SubsetReplaceReward(features_by_numpy, FeatureStatistics.from_features(features(real_images()))),
            "'subset_replace' does not move images .*numpy",
        ),
    ],
)
def test_rewards_that_have_no_gradient_at_all_train_by_the_pull_alone(tmp_path, caplog, reward, reason):
    with caplog.at_level("WARNING"):
        trainer = trained(tmp_path, reward_funcs=reward, **TRANSPORT, transport_advantage=0.5)
    assert re.search(reason, caplog.text) and "acts by transport_advantage alone" in caplog.text
    assert trainer.batch.displacement is None and trainer.batch.advantages.std() > 0.1
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_reward_may_abstain_and_moves_by_its_share_of_the_weights(tmp_path):
    def picky(images, **kwargs):
        scores = brightness(images)
        return scores if len(scores) == 2 else [None, *scores[1:]]  # the trial has two images

    def size(weights):
        settings = {**TRANSPORT, "learning_rate": 0.0, "transport_advantage": 0.5, "reward_weights": weights}
        moved = trained(tmp_path, reward_funcs=[picky, rounded], **settings).batch.displacement
        return moved.square().mean().sqrt().item(), moved

    even, moved = size([1.0, 1.0])
    assert even == pytest.approx(0.1, rel=1e-4) and size([3.0, 1.0])[0] == pytest.approx(0.15, rel=1e-4)
    assert not moved[0].any() and moved[1].any()  # micro-batches of 7: the first image of each abstains


def test_a_memory_error_in_the_trial_is_no_missing_gradient(tmp_path):
    def hungry(images, **kwargs):
        if images.requires_grad:
            raise torch.OutOfMemoryError("of memory")
        return brightness(images)

    with pytest.raises(torch.OutOfMemoryError):
        tiny_trainer(tmp_path, reward_funcs=hungry, **TRANSPORT, transport_advantage=0.5)


def test_displacement_does_not_depend_on_the_scale_of_the_reward_or_on_batches(tmp_path):
    def displaced(**settings):
        return trained(tmp_path, **{**TRANSPORT, "learning_rate": 0.0, **settings}).batch.displacement

    plain = displaced()
    torch.testing.assert_close(displaced(reward_weights=[1000.0]), plain, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(displaced(per_device_train_batch_size=5), plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_subsets": 12}, "which 'transport' replaces at once, must be below reference_set_size=24"),
        ({"num_generations": 2}, "num_generations=2: .* Set 1"),
        ({"best_of_n": 2}, "best_of_n=2"),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **TRANSPORT, **settings)


def test_a_velocity_network_and_latents_are_trained_alike(tmp_path):
    from tests.helpers import tiny_sit, tiny_vae
    from trl_distreward import SiTPipeline

    pipeline = SiTPipeline(tiny_sit(in_channels=4), tiny_vae())
    real = FeatureStatistics.from_features(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    reward = SubsetReplaceReward(lambda images: images.float().mean((2, 3)) / 127.5 - 1, real)
    trainer = trained(tmp_path, model=pipeline, reward_funcs=reward, **TRANSPORT, decode_batch_size=3)
    assert trainer.estimator.decoded_at_once == 3 and pipeline.vae.decoder.gradient_checkpointing
    assert (
        tiny_trainer(tmp_path / "one", model=pipeline, reward_funcs=reward, **TRANSPORT).estimator.decoded_at_once == 1
    )
    assert trainer.batch.displacement.shape == trainer.batch.sample.shape == (12, 4, 4, 4)
    assert trainer.batch.displacement.flatten(1).norm(dim=1).min() > 0
