# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import diffusers
import pytest
import torch

from tests.helpers import tiny_config, tiny_pipeline, tiny_trainer, trained
from tests.policies_tiny import ddim_pixels, sd3
from tests.runs import logged, weights
from trl_distreward import as_policy
from trl_distreward.trainer.estimators.forward_process import mean_square, nft_loss, regression

NFT = {"loss_type": "nft", "sampler": "ode", "reference_update": "rolling", "top_advantage_quantile": 1.0}


def drawn_velocities(count=6):
    """Velocities `(P, 3, 4)` of a network, the old policy and the samples, times and pulls `(P,)`; float64."""
    generator = torch.Generator().manual_seed(0)
    v, old, drawn = torch.randn(3, count, 3, 4, generator=generator, dtype=torch.float64)
    t, pull = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return v.requires_grad_(), old, drawn, t, 2 * pull - 1


def gradient(loss, v):
    return torch.autograd.grad(loss.sum(), v)[0]


def as_in_the_paper(v, old, x_0, x_1, t, r, beta):
    """DiffusionNFT's loss on predicted samples, with each branch's adaptive weight, as its authors write it."""
    t, r = t.view(-1, 1, 1), r.view(-1, 1, 1)
    x_t = (1 - t) * x_0 + t * x_1
    losses = []
    for branch in ((1 - beta) * old + beta * v, (1 + beta) * old - beta * v):
        predicted = x_t - t * branch
        weight = (predicted - x_0).detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        losses.append((predicted - x_0) ** 2 / weight)
    return (r * losses[0] + (1 - r) * losses[1]).mean((1, 2))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_nft_is_the_two_branch_loss_of_the_paper(beta):
    v, old, x_0, t, pull = drawn_velocities()
    x_1 = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = as_in_the_paper(v, old, x_0, x_1, t, (1 + pull) / 2, beta)
    loss = nft_loss(v, old, x_1 - x_0, t, pull, beta)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient(loss, v), gradient(expected, v), atol=1e-10, rtol=1e-10)


def test_nft_starts_as_a_regression_between_the_old_and_the_drawn_velocity():
    _, old, drawn, t, pull = drawn_velocities()
    v = old.clone().requires_grad_()
    target = old + pull.view(-1, 1, 1) * (drawn - old)
    plain = gradient(regression(v, target, old, drawn, t), v)
    torch.testing.assert_close(gradient(nft_loss(v, old, drawn, t, pull), v), plain, atol=1e-10, rtol=1e-10)


def first_batch(tmp_path, **settings):
    """A trainer after one update at rate 0, and its batch."""
    trainer = trained(tmp_path, learning_rate=0.0, max_grad_norm=0, **settings)
    return trainer, trainer.batch, [micro for micro, _ in trainer.batch.micro_batches(1000, 1)][0]


def test_rejection_sampling_fits_the_selected_images(tmp_path):
    trainer, batch, pairs = first_batch(tmp_path, loss_type="rft", num_train_timesteps=3)
    assert batch.num_images == 6 and batch.old is None and len(pairs["t"]) == 18
    pipeline = tiny_pipeline()
    with torch.no_grad():
        velocity = pipeline.predict_velocity(
            pipeline.transformer, pairs["x"], pairs["t"], pairs["cond"]["class_labels"]
        )
    expected = mean_square(velocity - pairs["drawn"]).mean().item()
    for name in ("loss", "flow_matching_loss"):
        assert logged(trainer, name)[0] == pytest.approx(expected, rel=1e-5)
    assert not logged(trainer, "ratio/mean")


def test_times_are_spread_and_noise_differs_between_images_steps_and_times(tmp_path):
    trainer = tiny_trainer(tmp_path, **NFT, num_train_timesteps=4, max_steps=2)
    trainer.train()
    _, first, _ = first_batch(tmp_path / "first", **NFT, num_train_timesteps=4)
    for batch in (first, trainer.batch):
        assert torch.equal((batch.times * 4).long(), torch.arange(4).expand(12, 4))
    noises = torch.cat([first.noise, trainer.batch.noise]).flatten(0, 1)
    assert len(noises.flatten(1).unique(dim=0)) == 2 * 12 * 4


def test_advantage_weighted_matching_is_the_gradient_of_weighted_errors(tmp_path):
    trainer, batch, pairs = first_batch(tmp_path, **{**NFT, "loss_type": "awm"})
    trainer.network.zero_grad()
    loss, values = trainer.estimator.loss(trainer.network, pairs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
    trainer.network.zero_grad()
    v = trainer.estimator.velocity(trainer.network, pairs)
    (pairs["weights"] * pairs["advantages"] * mean_square(v - pairs["drawn"])).sum().backward()
    assert len(found) > 5 and (values["ratio"] == 1).all()
    for name, p in trainer.network.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], p.grad, atol=1e-7, rtol=1e-4)


def bright(images, **kwargs):
    return images.float().mean((1, 2, 3))


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_nft_makes_rewarded_samples_likelier_and_others_less_likely(tmp_path, sampler):
    settings = {**NFT, "sampler": sampler, "num_subsets": 12, "replace_size": 1, "max_steps": 12}
    trainer = tiny_trainer(tmp_path, reward_funcs=bright, **settings)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 3
    assert all(0 < value < 1 for value in logged(trainer, "old_policy_distance")[1:])


def test_the_old_policy_follows_the_weights_before_each_rollout(tmp_path):
    settings = {**NFT, "old_policy_decay": 0.75, "num_iterations": 2, "max_steps": 3}
    trainer = tiny_trainer(tmp_path, **settings)
    start = weights(trainer.network)
    trainer.train()
    middle = trained(tmp_path / "middle", **{**settings, "max_steps": 2})  # the second rollout starts here
    old, end = trainer.estimator.old, weights(middle.network)
    for name, average in old.averages.items():
        torch.testing.assert_close(average, 0.75 * start[name] + 0.25 * end[name], atol=1e-6, rtol=1e-5)
    pairs, _ = next(trainer.batch.micro_batches(1000, 1))
    with old.swapped_in(trainer.network), torch.no_grad():
        velocity = trainer.estimator.velocity(trainer.network, pairs)
    torch.testing.assert_close(pairs["old"], velocity, atol=1e-5, rtol=1e-4)


def test_rollouts_can_come_from_the_old_policy(tmp_path):
    settings = {**NFT, "old_policy_decay": 0.99, "learning_rate": 0.1, "max_steps": 2}
    lagging = tiny_trainer(tmp_path, **settings, sample_old_policy=True)
    lagging.train()
    current = trained(tmp_path / "current", **settings)
    still = trained(tmp_path / "still", **{**settings, "learning_rate": 0.0})

    def moved(trainer):
        return (trainer.batch.sample - still.batch.sample).abs().mean().item()

    assert 0 < moved(lagging) < 0.2 * moved(current)


def test_guided_rollouts_train_the_velocity_without_guidance_and_partly_without_condition(tmp_path):
    pipeline = tiny_pipeline(class_dropout_prob=0.1)
    trainer = trained(tmp_path, model=pipeline, guidance_scale=3.0, condition_dropout=0.5, **NFT, learning_rate=0.0)
    pairs, _ = next(trainer.batch.micro_batches(1000, 1))
    labels = torch.where(pairs["dropped"], 3, pairs["cond"]["class_labels"])
    assert 0 < pairs["dropped"].float().mean() < 1
    with torch.no_grad():
        expected = pipeline.predict_velocity(pipeline.transformer, pairs["x"], pairs["t"], labels)
    torch.testing.assert_close(pairs["old"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_unguided_velocity_of_prompts_is_that_of_the_prompt_or_the_empty_prompt(guidance_scale):
    policy = as_policy(sd3(), guidance_scale)
    plain = as_policy(policy.pipeline, 1.0)
    prompts = ["a red cat", "the blue dog runs"]
    x, t = torch.randn(2, *policy.sample_shape), torch.tensor([0.3, 0.8])
    dropped = torch.tensor([True, False]) & (guidance_scale != 1.0)
    with torch.no_grad():
        found = policy.unguided_velocity(policy.model, x, t, policy.encode(prompts), dropped)
        expected = plain.velocity(plain.model, x, t, plain.encode(prompts))
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-4)
    assert torch.allclose(found[0], expected[0], atol=1e-5) == (guidance_scale == 1.0)


def test_kl_is_the_distance_from_the_initial_velocity(tmp_path):
    free, held = (trained(tmp_path / str(beta), **NFT, beta=beta, max_steps=6) for beta in (0.0, 50.0))
    start = weights(tiny_pipeline().transformer)

    def moved(trainer):
        return sum((value - start[name]).square().sum().item() for name, value in weights(trainer.network).items())

    assert logged(held, "kl")[0] == 0 < logged(held, "kl")[-1] and moved(held) < 0.5 * moved(free)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"old_policy_decay": 1.0}, "old_policy_decay=1.0"),
        ({"advantage_clip": 0.0}, "advantage_clip=0.0"),
        ({"nft_beta": -1.0}, "nft_beta=-1.0"),
        ({"transport_size": 0.0}, "transport_size=0.0 must be positive"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, loss_type="nft", **settings)


@pytest.mark.parametrize(
    ("scheduler", "name", "warned"),
    [
        ("LCMScheduler", "org/model", True),
        ("DDIMScheduler", "org/model-turbo", True),
        ("DDIMScheduler", "lightning_logs/model", False),
    ],
)
def test_a_model_distilled_for_few_steps_is_warned_about(tmp_path, caplog, scheduler, name, warned):
    pipeline = ddim_pixels()
    pipeline.register_modules(scheduler=getattr(diffusers, scheduler).from_config(pipeline.scheduler.config))
    pipeline.register_to_config(_name_or_path=name)
    tiny_trainer(tmp_path, model=pipeline, reward_funcs=bright, **NFT)
    assert ("looks distilled for few steps" in caplog.text) == warned
