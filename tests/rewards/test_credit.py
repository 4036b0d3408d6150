# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_distreward import FeatureStatistics, FrechetDistance, SubsetReplaceReward, frechet_distance


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


def test_leave_one_in_credit_equals_the_updated_sets_gain_by_the_image():
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


def test_control_variate_removes_the_effect_of_old_images_and_keeps_the_mean():
    plain, adjusted = reward_for(REAL, REFERENCE), reward_for(REAL, REFERENCE, control_variate=True)
    slots = torch.arange(40)[:, None]  # every slot once, and the same new image in each
    new = {"features": draw(1, 3).expand(40, -1)}
    before, after = plain.score(slots, new), adjusted.score(slots, new)
    assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-12)  # over uniform slots: no bias
    assert after.var() < 0.02 * before.var()  # all that differed was what was removed


def test_control_variate_lowers_the_variance():
    slots = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:4] for i in range(200)])
    new = {"features": draw(800, 4, spread=0.8)}
    before, after = (reward_for(REAL, REFERENCE, control_variate=on).score(slots, new) for on in (False, True))
    assert after.var() < 0.8 * before.var()


def test_more_of_the_same_image_earns_less_by_leave_one_in():
    reference = draw(60, 5, spread=0.5)
    reward = reward_for(REAL, reference, credit="leave_one_in")
    wanted = torch.full((1, 6), 0.9, dtype=torch.float64)  # far out, where the narrow set has too little
    alone = reward.score(torch.tensor([[0]]), {"features": wanted}).item()
    copies = reward.score(torch.arange(25)[None], {"features": wanted.expand(25, -1)})
    assert alone > 0 and (copies < 0).all()  # one is rewarded, of 25 copies each is punished
    assert reward.subset_rewards(torch.arange(25)[None], {"features": wanted.expand(25, -1)}) < -fd(reference, REAL)


def test_baseline_is_the_mean_reward_of_the_same_policy():
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


def test_expected_gradient_is_the_replaced_part_of_the_whole_sets():
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


def test_kernel_distances_give_credit_and_reset_forgets():
    reward = SubsetReplaceReward(identity, draw(80, 0).float(), "kernel", credit="leave_one_in")
    reward.set_reference({"features": draw(40, 1, spread=0.8)})
    slots, new = torch.tensor([[0, 1], [2, 3]]), {"features": draw(4, 3)}
    assert reward.score(slots, new).shape == (2, 2)
    reward.reset()
    with pytest.raises(ValueError, match="no reference set yet"):
        reward.score(slots, new)


def test_metrics_are_plain_distances_and_leave_the_reference_set_alone():
    reward = SubsetReplaceReward(identity, FeatureStatistics.from_features(REAL), space_weights={"features": 3.0})
    reward.set_reference({"features": REFERENCE})
    metric, other = reward.metrics()["features"], draw(60, 2)
    metric.update(other.view(60, 6, 1, 1))
    assert metric.compute() == pytest.approx(fd(other, REAL), rel=1e-5)
    assert reward.reference_distances["features"] == pytest.approx(fd(REFERENCE, REAL), rel=1e-6)


def test_contradictions_are_refused():
    class Plain:
        dimension = 6

        def __init__(self, real):
            pass

    real = FeatureStatistics.from_features(REAL)
    with pytest.raises(ValueError, match="credit='each' is unknown"):
        SubsetReplaceReward(identity, real, credit="each")
    with pytest.raises(ValueError, match="control_variate=True corrects shared rewards"):
        SubsetReplaceReward(identity, real, credit="leave_one_in", control_variate=True)
    with pytest.raises(TypeError, match="has no delete_one"):
        SubsetReplaceReward(identity, real, Plain, control_variate=True)
    two = {"a": identity, "b": identity}
    reward = SubsetReplaceReward(two, {"a": real, "b": FeatureStatistics.from_features(REFERENCE)})
    with pytest.raises(ValueError, match="must be positive to divide by"):
        reward.set_reference({"a": REFERENCE.float(), "b": REFERENCE.float().double()})
