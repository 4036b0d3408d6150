# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Features are taken slice by slice, and no more than a slice of images is held."""

import pytest
import torch

from tests.helpers import tiny_sit, tiny_vae
from trl_distreward import FeatureStatistics, SiTPipeline, SubsetReplaceReward
from trl_distreward.policies import as_policy
from trl_distreward.trainer.judged import Judge, Judged, Stopwatch
from trl_distreward.trainer.measurement import AllocatedBytes
from trl_distreward.trainer.reward_functions import RewardFunctions

REAL = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * 30 + 128


def quarters(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (B, 12)


def judge_of(batch_size, functions, **kwargs):
    policy = as_policy(SiTPipeline(tiny_sit(in_channels=4, sample_size=8), tiny_vae()))
    return Judge(policy, RewardFunctions(functions), batch_size, torch.device("cpu"), **kwargs)


def brightness(images, **_):
    return images.float().mean(dim=(1, 2, 3)).tolist()


def test_memory_is_that_of_a_slice_and_features_are_those_of_all_at_once():
    reward = SubsetReplaceReward(quarters, FeatureStatistics.from_features(REAL))
    x, labels = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    peaks, judged = {}, {}
    for size in (None, 8, 2):
        with AllocatedBytes() as counter:
            judged[size] = judge_of(size, [reward])(x, labels)
        peaks[size] = counter.most
        assert judged[size].images is None and judged[size].finite
        torch.testing.assert_close(judged[size].features, judged[None].features, atol=1e-3, rtol=1e-5)
    assert peaks[2] < peaks[8] / 2 < peaks[None] / 8


def test_images_are_kept_for_functions_that_look_at_them():
    reward = SubsetReplaceReward(quarters, FeatureStatistics.from_features(REAL))
    assert not RewardFunctions([reward]).need_images and RewardFunctions([reward, brightness]).need_images
    x, labels = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    judged = judge_of(2, [reward, brightness], keep_images=True)(x, labels)
    assert judged.images.shape == (5, 3, 16, 16) and judged.images.dtype == torch.uint8
    torch.testing.assert_close(judged.features[0]["features"], quarters(judged.images))


def test_rows_are_picked_from_their_candidates():
    candidates = [
        Judged([{"a": torch.full((3, 2), float(i))}], torch.tensor([True, True, i > 0]), torch.full((3, 1), i))
        for i in range(2)
    ]
    picked = Judged.pick(candidates, torch.tensor([1, 0, 1]))
    assert picked.features[0]["a"][:, 0].tolist() == [1, 0, 1] and picked.images.flatten().tolist() == [1, 0, 1]
    assert picked.finite and not candidates[0].finite
    picked.features[0]["a"][1] = torch.nan
    assert not picked.finite and Judged([], torch.ones(2, dtype=torch.bool)).finite


def test_a_stopwatch_adds_up_and_starts_anew(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.read() == pytest.approx(2.5) and watch.read() == 0
