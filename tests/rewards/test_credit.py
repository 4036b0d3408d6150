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
            gain = fd(without, REAL) - fd(updated, REAL) - reward.removal_effects.mean().item()
            assert credits[b, j].item() == pytest.approx(gain, rel=1e-5)
    assert reward(new.view(6, 6, 1, 1), slots=slots) == pytest.approx(credits.flatten().tolist())


def test_control_variate_removes_the_effect_of_old_images_and_keeps_the_mean():
    plain, adjusted = reward_for(REAL, REFERENCE), reward_for(REAL, REFERENCE, control_variate=True)
    slots = torch.arange(40)[:, None]  # every slot once, and the same new image in each
    new = {"features": draw(1, 3).expand(40, -1)}
    before, after = plain.score(slots, new), adjusted.score(slots, new)
    assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-12)  # over uniform slots: no bias
    assert after.var() < 0.02 * before.var()  # all that differed was what was removed


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
    gaps, slopes, full_slopes = torch.empty(3, 400)
    for seed in range(400):
        reference, new = draw(count, 1000 + seed, 3), draw(size, 9000 + seed, 3)
        distance = FrechetDistance(FeatureStatistics.from_features(draw(100, 6, 3)))
        indices = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size][None]
        distance.fit(reference)
        same, ahead, back = (distance.replaced(indices, (new * (1 + s))[None]).item() for s in (0, step, -step))
        gaps[seed], slopes[seed] = same - distance.value, (ahead - back) / (2 * step)
        wide, narrow = (distance.fit(reference * (1 + s)).value for s in (step, -step))
        full_slopes[seed] = (wide - narrow) / (2 * step)
    differences = slopes - size / count * full_slopes
    assert gaps.mean().abs() < 4 * gaps.std() / 20
    assert differences.mean().abs() < 4 * differences.std() / 20
    assert full_slopes.mean().abs() > 10 * differences.std() / 20  # there was something to see


class Plain:
    dimension = 6

    def __init__(self, real):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "each"}, "credit='each' is unknown"),
        ({"credit": "leave_one_in", "control_variate": True}, "control_variate=True corrects shared rewards"),
        ({"distance": Plain, "control_variate": True}, "has no delete_one"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SubsetReplaceReward(identity, FeatureStatistics.from_features(REAL), **options)


def test_a_first_distance_of_zero_cannot_be_a_unit():
    real = {name: FeatureStatistics.from_features(rows) for name, rows in (("a", REAL), ("b", REFERENCE))}
    reward = SubsetReplaceReward({"a": identity, "b": identity}, real)
    with pytest.raises(ValueError, match="must be positive to divide by"):
        reward.set_reference({"a": REFERENCE.float(), "b": REFERENCE.float().double()})


def classes(count=40, rare=8):
    """Labels of a set in which the last `rare` images are of a class far from the others."""
    return torch.arange(count) >= count - rare


@pytest.mark.parametrize("options", [{"credit": "leave_one_in"}, {"control_variate": True}])
def test_no_class_gets_more_credit_for_being_rare(options):
    far = classes()[:, None] * 4.0
    real, reference = draw(200, 0) + classes(200, 60)[:, None] * 4.0, REFERENCE + far
    slots, new = torch.arange(40)[:, None], {"features": draw(40, 8, spread=0.8) + far}

    def offset(members):
        reward = reward_for(real, reference, **options)
        if members is not None:
            reward.centre_by(members)
        scores = reward.score(slots, new).flatten()
        return (scores[classes()].mean() - scores[~classes()].mean()).abs().item(), scores.var().item()

    groups = [(~classes()).nonzero().flatten(), classes().nonzero().flatten()]
    (plain, spread), (centred, less) = offset(None), offset(groups)
    if "credit" in options:  # the removed image's class cancels in a plain reward
        assert centred < 0.3 * plain and less < spread
    else:
        assert centred < plain or less < spread
    assert offset([torch.tensor([i]) for i in range(40)]) == (plain, spread)  # groups too small for a mean
