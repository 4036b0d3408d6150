# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.rewards.test_credit import REAL, draw, reward_for
from trl_distreward.rewards.diagnostics import reward_diagnostics


def diagnose(new, reference, conditions, slots):
    reward = reward_for(REAL, reference)
    return reward_diagnostics(reward, slots, {"features": new}, conditions, torch.Generator().manual_seed(0))


def test_spread_of_equal_images_is_all_placement():
    slots = torch.stack([torch.randperm(400, generator=torch.Generator().manual_seed(i))[:4] for i in range(64)])
    found = diagnose(draw(4, 1).repeat(64, 1), draw(400, 2, spread=0.8), torch.zeros(400, dtype=torch.long), slots)
    assert found["placement_share"] == pytest.approx(1, abs=0.4)
    assert found["removed_share"] > 0.9
    assert found["signal_to_noise"] < 0.7


def test_images_in_the_only_place_of_their_condition_have_no_placement_noise():
    slots = torch.arange(40).view(20, 2)
    found = diagnose(draw(40, 1), draw(40, 2, spread=0.8), [f"prompt {i}" for i in range(40)], slots)
    assert found["placement_share"] == pytest.approx(0, abs=1e-12)


def test_spread_grows_with_the_subset_as_its_root():
    """The shape of Table 5."""
    slots = torch.stack([torch.randperm(400, generator=torch.Generator().manual_seed(i))[:16] for i in range(300)])
    found = diagnose(draw(4800, 1, spread=0.8), draw(400, 2, spread=0.8), torch.zeros(400, dtype=torch.long), slots)
    spreads = [found[f"cv_percent/n_{n}"] for n in (1, 2, 4, 8, 16)]
    for small, large in zip(spreads, spreads[1:], strict=False):
        assert large / small == pytest.approx(2**0.5, rel=0.25)
    assert abs(found["drift"]) < 1.5  # the same policy: a placebo
    moved = diagnose(draw(4800, 1, spread=1.3), draw(400, 2, spread=0.8), torch.zeros(400, dtype=torch.long), slots)
    assert moved["drift"] > 3
