# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from safetensors.torch import save_file

from trl_distreward import (
    DebiasedDistance,
    FeatureStatistics,
    FrechetDistance,
    KernelDistance,
    SubsetReplaceReward,
    SumDistance,
    frechet_distance,
)


def identity(images):
    return images.flatten(1).double()


def draw(count, seed, dimension=6, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def reward_for(real, reference, **kwargs):
    reward = SubsetReplaceReward(identity, FeatureStatistics.from_features(real), **kwargs)
    reward.set_reference({"features": reference})
    return reward


def fd(features, real):
    return frechet_distance(FeatureStatistics.from_features(features), FeatureStatistics.from_features(real))


REAL, REFERENCE = draw(200, 0), draw(40, 1, spread=0.8).float().double()


def test_leave_one_in_credit_is_what_the_updated_set_gains_by_the_image():
    reward = reward_for(REAL, REFERENCE, credit="leave_one_in")
    slots, new = torch.tensor([[0, 7, 30], [5, 6, 7]]), draw(6, 2).float().double()
    credits = reward.score(slots, {"features": new})
    assert credits.shape == (2, 3)
    for b in range(2):
        updated = REFERENCE.clone()
        updated[slots[b]] = new[3 * b : 3 * b + 3]
        for j in range(3):
            without = torch.cat([updated[: slots[b, j]], updated[slots[b, j] + 1 :]])
            assert credits[b, j].item() == pytest.approx(fd(without, REAL) - fd(updated, REAL), rel=1e-5)
    assert reward(new.view(6, 6, 1, 1), slots=slots) == pytest.approx(credits.flatten().tolist())


def test_control_variate_takes_out_the_removed_images_and_leaves_the_mean():
    plain, adjusted = reward_for(REAL, REFERENCE), reward_for(REAL, REFERENCE, control_variate=True)
    slots = torch.arange(40)[:, None]  # every slot once, and the same new image in each
    new = {"features": draw(1, 3).expand(40, -1)}
    before, after = plain.score(slots, new), adjusted.score(slots, new)
    assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-12)  # over uniform slots: no bias
    assert after.var() < 0.02 * before.var()  # all that differed was what was removed


def test_shared_rewards_lose_variance_to_the_control_variate():
    slots = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:4] for i in range(200)])
    new = {"features": draw(800, 4, spread=0.8)}
    before, after = (reward_for(REAL, REFERENCE, control_variate=on).score(slots, new) for on in (False, True))
    assert after.var() < 0.8 * before.var()


def test_more_of_the_same_image_earns_less_by_leave_one_in():
    """The trick that add-one credit pays for: many copies of an image that one of would have been welcome."""
    reference = draw(60, 5, spread=0.5)
    reward = reward_for(REAL, reference, credit="leave_one_in")
    wanted = torch.full((1, 6), 0.9, dtype=torch.float64)  # far out, where the narrow set has too little
    alone = reward.score(torch.tensor([[0]]), {"features": wanted}).item()
    copies = reward.score(torch.arange(25)[None], {"features": wanted.expand(25, -1)})
    add_one = reward.distances["features"].add_one(wanted).item()
    assert alone > 0 and add_one < 0  # one is rewarded, by either credit
    assert (copies < 0).all()  # of 25 every one is punished
    assert reward.subset_rewards(torch.arange(25)[None], {"features": wanted.expand(25, -1)}) < -fd(reference, REAL)


def test_baseline_is_what_images_of_the_same_policy_get():
    for kwargs in ({}, {"credit": "leave_one_in"}, {"control_variate": True}):
        differences = []
        for seed in range(60):
            reference, new = draw(2 * 60, 100 + seed, spread=0.8).view(2, 60, 6)
            reward = reward_for(REAL, reference, **kwargs)
            slots = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).view(15, 4)
            differences.append(reward.score(slots, {"features": new}).mean().item() - reward.baseline)
        differences = torch.tensor(differences)
        error = differences.std() / 60**0.5
        # credits are differences inside a set that has changed in four places: equal up to 1/N² only
        assert differences.mean().abs() < 4 * error + (1e-3 if kwargs.get("credit") else 0), kwargs


def test_replaced_set_is_distributed_as_a_fresh_one_and_its_gradient_is_the_part_replaced():
    """
    With uniform slots and members alike, E[D after replacing n of N] = E[D of N], and its derivative by the policy of
    the new images is n/N of the derivative of E[D of N] by the policy of all.
    """
    count, size, step = 24, 6, 0.05
    gaps, slopes, full_slopes = [], [], []
    for seed in range(400):
        reference, new = draw(count, 1000 + seed, 3), draw(size, 9000 + seed, 3)
        distance = FrechetDistance(FeatureStatistics.from_features(draw(100, 6, 3)))
        indices = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size][None]
        distance.fit(reference)
        shifted = [distance.replaced(indices, (new * (1 + s))[None]).item() for s in (0, step, -step)]
        gaps.append(shifted[0] - distance.value)
        slopes.append((shifted[1] - shifted[2]) / (2 * step))
        wide, narrow = (distance.fit(reference * (1 + s)).value for s in (step, -step))
        full_slopes.append((wide - narrow) / (2 * step))
    gaps, differences = torch.tensor(gaps), torch.tensor(slopes) - size / count * torch.tensor(full_slopes)
    assert gaps.mean().abs() < 4 * gaps.std() / 20
    assert differences.mean().abs() < 4 * differences.std() / 20
    assert torch.tensor(full_slopes).mean().abs() > 10 * differences.std() / 20  # there was something to see


def test_debiased_reward_is_the_extrapolated_distance():
    reward = reward_for(REAL, REFERENCE, debias=True)
    distance = DebiasedDistance(lambda: FrechetDistance(FeatureStatistics.from_features(REAL))).fit(REFERENCE)
    slots, new = torch.tensor([[3, 9]]), draw(2, 8).float().double()
    assert reward.score(slots, {"features": new}).item() == pytest.approx(
        -distance.replaced(slots, new[None]).item(), rel=1e-6
    )
    metric = reward.metrics()["features"]  # evaluations stay comparable with the literature's
    metric.update(REFERENCE.view(40, 6, 1, 1))
    assert metric.compute() == pytest.approx(fd(REFERENCE, REAL), rel=1e-5)


def test_other_distances_and_sums_serve_and_come_back_with_their_scales():
    real = draw(80, 0).float()

    def both(features):
        statistics = FeatureStatistics.from_features(features)
        return SumDistance(
            {"fd": FrechetDistance(statistics), "mmd": KernelDistance(features, unbiased=False)}, normalize=True
        )

    kernel = SubsetReplaceReward(identity, real, "kernel", credit="leave_one_in")
    total = SubsetReplaceReward(identity, real, both)
    for reward in (kernel, total):
        reward.set_reference({"features": draw(40, 1, spread=0.8)})
    assert total.baseline == pytest.approx(-2.0)
    total.set_reference({"features": draw(40, 2, spread=0.9)})
    other = SubsetReplaceReward(identity, real, both)
    other.load_state_dict(total.state_dict())
    slots, new = torch.tensor([[0, 1], [2, 3]]), {"features": draw(4, 3)}
    assert torch.equal(other.score(slots, new), total.score(slots, new))
    assert other.baseline == total.baseline != pytest.approx(-2.0)
    assert kernel.score(slots, new).shape == (2, 2)
    total.reset()
    with pytest.raises(ValueError, match="no reference set yet"):
        total.score(slots, new)
    total.set_reference({"features": draw(40, 2, spread=0.9)})
    assert total.baseline == pytest.approx(-2.0)  # the first again


def test_scales_that_a_distance_came_with_outlast_a_reset():
    def scaled(features):
        total = SumDistance({"mmd": KernelDistance(features, unbiased=False)}, normalize=True)
        total.scales = {"mmd": 3.0}
        return total

    reward = SubsetReplaceReward(identity, draw(80, 0).float(), scaled)
    reward.set_reference({"features": draw(40, 1, spread=0.8)})
    reward.reset()
    assert reward.distances["features"].scales == {"mmd": 3.0}


def test_a_sum_is_debiased_as_if_made_anew():
    real, reference = draw(80, 0).float(), draw(40, 1, spread=0.8).float()

    def both(features):
        statistics = FeatureStatistics.from_features(features)
        return SumDistance({"fd": FrechetDistance(statistics), "mmd": KernelDistance(features, unbiased=False)})

    reward = SubsetReplaceReward(identity, real, both, debias=True)
    reward.set_reference({"features": reference})
    fresh = DebiasedDistance(lambda: both(real)).fit(reference)
    slots, new = torch.tensor([[0, 1], [22, 39]]), draw(4, 3)
    torch.testing.assert_close(-reward.score(slots, {"features": new}), fresh.replaced(slots, new.view(2, 2, 6)))
    assert reward.baseline == pytest.approx(-fresh.value)


def test_metrics_of_a_normalized_sum_compare_from_set_to_set(tmp_path):
    real = draw(80, 0).float()
    save_file({"features": real}, tmp_path / "real.safetensors")

    def both(features):
        statistics = FeatureStatistics.from_features(features)
        parts = {"fd": FrechetDistance(statistics), "mmd": KernelDistance(features, unbiased=False)}
        return SumDistance(parts, normalize=True)

    metric = SubsetReplaceReward(identity, str(tmp_path / "real.safetensors"), both).metrics()["features"]
    values = []
    for spread in (0.8, 0.3, 0.8):
        metric.reset()
        metric.update(draw(60, 1, spread=spread).view(60, 6, 1, 1))
        values.append(metric.compute())
    assert values[0] == values[2] != pytest.approx(2.0)
    assert values[1] > 2 * values[0]


def test_what_does_not_fit_is_refused():
    class Plain:
        dimension = 6

        def __init__(self, real):
            pass

    real = FeatureStatistics.from_features(REAL)
    with pytest.raises(ValueError, match="credit='each' is unknown"):
        SubsetReplaceReward(identity, real, credit="each")
    with pytest.raises(ValueError, match="control_variate=True has nothing to take"):
        SubsetReplaceReward(identity, real, credit="leave_one_in", control_variate=True)
    for distance in (Plain, lambda real: SumDistance([Plain(real)])):
        with pytest.raises(TypeError, match="has no delete_one"):
            SubsetReplaceReward(identity, real, distance, control_variate=True)
    two = {"a": identity, "b": identity}
    reward = SubsetReplaceReward(two, {"a": real, "b": FeatureStatistics.from_features(REFERENCE)})
    with pytest.raises(ValueError, match="cannot be divided by"):
        reward.set_reference({"a": REFERENCE.float(), "b": REFERENCE.float().double()})
