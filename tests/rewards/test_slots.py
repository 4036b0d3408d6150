# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import tiny_trainer
from trl_distreward.rewards import SlotSampler, StratifiedSlotSampler

STRATA = ["a"] * 50 + ["b"] * 30 + ["c"] * 13 + ["d"] * 7


def counts_of(slots):
    return torch.tensor([[[STRATA[s] for s in row].count(name) for name in "abcd"] for row in slots.tolist()])


def test_plain_slots_are_distinct_within_subsets_and_repeatable():
    draws = [SlotSampler(20, seed=1).draw(50, 7) for _ in range(2)]
    assert torch.equal(*draws)
    assert all(len(set(row.tolist())) == 7 for row in draws[0])
    counts = torch.bincount(SlotSampler(20).draw(4000, 5).flatten(), minlength=20).double()
    assert ((counts / counts.sum() - 1 / 20).abs() < 5 * (0.05 * 0.95 / 20000) ** 0.5).all()  # uniform


def test_distinct_slots_come_in_rounds_without_replacement():
    sampler = SlotSampler(20, seed=1)
    first, rest = (sampler.draw(10, 3, distinct=True) for _ in range(2))  # 30 slots: one round and a half
    assert sorted(first.flatten()[:20].tolist()) == list(range(20))
    assert all(len(set(row.tolist())) == 3 for row in torch.cat([first, rest]))
    assert (torch.bincount(torch.cat([first, rest]).flatten(), minlength=20) == 3).all()


def test_distinct_slots_stay_distinct_over_a_batch_that_crosses_a_round():
    sampler = SlotSampler(1000, seed=0)
    for num_subsets, size in ((256, 1), (3, 50)):
        for _ in range(20):
            slots = sampler.draw(num_subsets, size, distinct=True).flatten()
            assert len(slots.unique()) == num_subsets * size


def test_every_subset_keeps_the_strata_in_proportion():
    sampler, share = StratifiedSlotSampler(STRATA, seed=1), torch.tensor([10, 6, 2.6, 1.4])
    for distinct in (False, True):
        for _ in range(5):
            counts = counts_of(sampler.draw(4, 20, distinct))
            assert (counts >= share.floor()).all() and (counts <= share.ceil()).all()
            total = counts.sum(dim=0)
            assert (total >= (4 * share).floor()).all() and (total <= (4 * share).ceil()).all()


def test_slots_are_distinct_uniform_and_repeatable():
    for distinct in (False, True):
        draws = [StratifiedSlotSampler(STRATA, seed=2).draw(4000, 5, distinct) for _ in range(2)]
        assert torch.equal(*draws)
        assert all(len(set(row)) == 5 for row in draws[0].tolist())
        seen = torch.bincount(draws[0].flatten(), minlength=100)
        spread = (20000 * 0.01 * 0.99) ** 0.5
        assert (seen - 200).abs().max() < (5 * spread if not distinct else 2)
        # the first of a subset is of any stratum, not always of the first
        first = torch.bincount(draws[0][:, 0], minlength=100)[50:].sum().item()
        assert first == pytest.approx(2000, abs=5 * 1000**0.5)


def test_distinct_slots_are_distinct_over_a_draw_and_come_in_rounds():
    sampler = StratifiedSlotSampler(STRATA, seed=0)
    slots = torch.cat([sampler.draw(10, 1, distinct=True).flatten() for _ in range(10)])
    whole = slots[slots < 80]  # strata of which a draw takes a whole number
    assert sorted(whole.tolist()) == list(range(80))
    for _ in range(10):
        slots = sampler.draw(9, 10, distinct=True).flatten()
        assert len(slots.unique()) == 90


def test_resumes_in_the_middle_of_a_round_and_refuses_other_strata():
    sampler, other = StratifiedSlotSampler(STRATA, seed=1), StratifiedSlotSampler(STRATA, seed=2)
    sampler.draw(3, 7, distinct=True)
    other.load_state_dict(sampler.state_dict())
    for distinct in (True, False, True):
        assert torch.equal(sampler.draw(5, 3, distinct), other.draw(5, 3, distinct))
    for one, another in ((StratifiedSlotSampler([0, 1] * 50), sampler), (sampler, SlotSampler(100))):
        with pytest.raises(ValueError, match="slots have other strata"):
            one.load_state_dict(another.state_dict())
    with pytest.raises(ValueError, match="slots have other strata"):
        SlotSampler(100).load_state_dict(sampler.state_dict())


def test_the_trainer_draws_from_strata(tmp_path):
    trainer = tiny_trainer(tmp_path, stratify_by="class_labels", replace_size=3)
    trainer.train()
    for _ in range(3):
        labels = trainer.conditions[trainer.estimator.draw_slots(trainer.slot_sampler)]
        assert (labels.sort(dim=1).values == torch.arange(3)).all()
    with pytest.raises(ValueError, match="stratify_by='topic' needs a train_dataset with that column"):
        tiny_trainer(tmp_path, stratify_by="topic")
