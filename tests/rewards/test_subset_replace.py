# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn

from tests.helpers import features, real_images, tiny_reward
from trl_distreward import FeatureDistance, FeatureStatistics, JointFeatures, SubsetReplaceReward, frechet_distance
from trl_distreward.metrics.extractors import extract_features
from trl_distreward.rewards import SlotSampler


def images(count, seed=0):
    return torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def pixels(batch):
    return batch.flatten(1).float() / 255


def test_reward_is_minus_the_distance_of_the_updated_set():
    reward, reference, new = tiny_reward(), images(30), images(8, seed=1)
    reward.set_reference(reward.extract(reference))
    slots = torch.tensor([[3, 17, 5, 0], [29, 1, 2, 3]])
    rewards = reward(images=new, slots=slots, trainer_state=None)
    assert len(rewards) == 8
    real = FeatureStatistics.from_features(features(real_images()))
    for b in range(2):
        updated = reference.clone()
        updated[slots[b]] = new[4 * b : 4 * b + 4]
        expected = -frechet_distance(FeatureStatistics.from_features(features(updated)), real)
        assert rewards[4 * b : 4 * b + 4] == pytest.approx([expected] * 4, rel=1e-6)


def test_several_spaces_are_each_divided_by_their_first_distance():
    real = real_images()
    extractors = {"random": features, "pixels": pixels}
    statistics = {name: FeatureStatistics.from_features(f(real)) for name, f in extractors.items()}
    reward = SubsetReplaceReward(extractors, statistics, space_weights={"pixels": 0.5})
    reward.set_reference(reward.extract(images(30)))
    first = dict(reward.reference_distances)
    slots, new = torch.tensor([[4, 9]]), reward.extract(images(2, seed=3))
    for seed in (1, 2):  # the scale stays that of the first reference set
        expected = -sum(
            weight * reward.distances[name].replaced(slots, new[name][None]).item() / first[name]
            for name, weight in {"random": 1.0, "pixels": 0.5}.items()
        )
        assert reward.score(slots, new).item() == pytest.approx(expected, rel=1e-12)
        reward.set_reference(reward.extract(images(30, seed=seed)))


def test_rolling_update_keeps_new_images_in_their_places():
    reward = tiny_reward()
    reward.set_reference(reward.extract(images(10)))
    before = reward.features["features"].clone()
    slots, new = torch.tensor([[3, 7], [0, 9]]), reward.extract(images(4, seed=1))
    scored = reward.score(slots[:1], {"features": new["features"][:2]})
    reward.update_reference(slots[:1], {"features": new["features"][:2]})
    after = reward.features["features"]
    assert torch.equal(after[[3, 7]], new["features"][:2])
    untouched = [0, 1, 2, 4, 5, 6, 8, 9]
    assert torch.equal(after[untouched], before[untouched])
    # the reward that was given is the distance the set now has
    assert -reward.reference_distances["features"] == pytest.approx(scored.item(), rel=1e-9)


def test_of_several_candidates_for_a_place_one_stays_at_random():
    reward = tiny_reward()
    reward.set_reference(reward.extract(images(10)))
    slots, new = torch.full((6, 1), 4), reward.extract(images(6, seed=1))
    chosen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        reward.update_reference(slots, new, generator)
        match = (new["features"] == reward.features["features"][4]).all(dim=1).nonzero().flatten()
        assert len(match) == 1
        chosen.add(match.item())
    assert chosen == set(range(6))


def test_state_round_trip_gives_the_same_rewards():
    reward = tiny_reward()
    reward.set_reference(reward.extract(images(20)))
    reward.update_reference(torch.tensor([[1, 2]]), reward.extract(images(2, seed=5)))
    other = tiny_reward()
    other.load_state_dict(reward.state_dict())
    slots, new = torch.tensor([[0, 3]]), images(2, seed=7)
    assert other(new, slots=slots) == reward(new, slots=slots)
    assert other.first_distances == reward.first_distances
    foreign = SubsetReplaceReward({"pixels": pixels}, {"pixels": FeatureStatistics.from_features(pixels(images(20)))})
    assert other.describe() == reward.describe() != foreign.describe()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def features(self, images):
        return self.layer(images.float().flatten(1))

    forward = features


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: n.features, lambda n: JointFeatures(n.features, 3, 1)])
def test_networks_are_frozen_and_moved_behind_methods_and_wrappers_too(wrap):
    network = Network()
    reward = SubsetReplaceReward(wrap(network), FeatureStatistics.from_features(torch.randn(40, 8)))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    reward.to(torch.device("meta"))
    assert network.layer.weight.is_meta


def test_joint_features_see_labels_that_images_alone_do_not():
    labels = torch.arange(60) % 3
    pictures = (labels * 80).view(-1, 1, 1, 1).to(torch.uint8) + images(60) // 16
    joint = JointFeatures(pixels, num_classes=3, scale=1)
    alone = FeatureDistance(pixels, FeatureStatistics.from_features(pixels(pictures)))
    beside = FeatureDistance(joint, FeatureStatistics.from_features(joint(pictures, labels)))

    def distance(metric, asked):
        metric.reset()
        metric.update(pictures, asked)
        return metric.compute()

    assert distance(alone, labels.roll(1)) == pytest.approx(0, abs=1e-6)
    assert distance(beside, labels) == pytest.approx(0, abs=1e-6)
    assert distance(beside, labels.roll(1)) > 0.1
    assert torch.equal(joint(pictures, labels.to(torch.uint8)), joint(pictures, labels))
    with pytest.raises(ValueError, match="takes images and their conditions: pass conditions too"):
        extract_features(joint, pictures)


def test_extraction_goes_in_batches_of_a_bounded_size():
    sizes = []

    def extractor(batch):
        sizes.append(len(batch))
        return features(batch)

    reward = SubsetReplaceReward(extractor, FeatureStatistics.from_features(features(real_images())))
    values = reward.extract(images(600))["features"]
    assert max(sizes) <= 256 and sum(sizes) == 600
    torch.testing.assert_close(values, features(images(600)))


def test_bad_input_is_refused():
    real = FeatureStatistics.from_features(torch.randn(20, 8))

    def extract(extractor):
        return lambda: SubsetReplaceReward(extractor, real).extract(images(3))

    cases = [
        (extract(lambda x: features(x)[:2]), "must return \\(3, d\\)"),
        (extract(lambda x: torch.zeros(len(x), 5)), "dimension 5"),
        (extract(lambda x: torch.full((len(x), 8), float("nan"))), "NaN or infinite values in 3 of 3 rows"),
        (lambda: SubsetReplaceReward({"a": features}, real), r"extractors' names \['a'\]"),
        (lambda: SubsetReplaceReward(features, real, distance="wasserstein"), "distance='wasserstein'"),
        (lambda: tiny_reward()(images(2), slots=torch.tensor([[0, 1]])), "no reference set"),
        (lambda: SlotSampler(10).draw(1, 10), "replace_size=10 is not smaller than reference_set_size=10"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
