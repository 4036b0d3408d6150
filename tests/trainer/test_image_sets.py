# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import tiny_merge_trainer, tiny_trainer
from tests.runs import calls_of
from trl_distreward.trainer import image_sets
from trl_distreward.trainer.image_sets import fits

AUTOMATIC = {"per_device_eval_batch_size": 0, "rollout_batch_size": None}


def sizes(trainer):
    """Runs an update; numbers of images that were decoded together, without those of the checks before it."""
    decoded = calls_of(trainer.policy, "decode")
    trainer.train()
    return [len(x) for (x,), _ in decoded]


def test_batches_are_large_unless_a_size_is_asked_for(tmp_path):
    settings = {"max_steps": 1, "reference_set_size": 100}
    asked = {"per_device_eval_batch_size": 50, "rollout_batch_size": 8}
    assert sizes(tiny_trainer(tmp_path, **settings, **AUTOMATIC)) == [64, 36, 12]
    assert sizes(tiny_trainer(tmp_path, **settings, **asked)) == [50, 50, 8, 4]
    merging = {"max_steps": 1, "num_generations": 2, "reference_set_size": 70, "per_device_eval_batch_size": 0}
    assert sizes(tiny_merge_trainer(tmp_path, **merging)) == [64, 6] * 7  # the start, two candidates and four merges


@pytest.mark.parametrize("part", ["velocity", "decode", "extract"])
def test_a_batch_fits_if_network_decoder_and_extractors_have_memory(tmp_path, monkeypatch, part):
    trainer = tiny_trainer(tmp_path)
    owner = trainer.rewards.of_sets[0] if part == "extract" else trainer.policy
    whole, memory = getattr(owner, part), 9

    def limited(*args, **kwargs):
        x = args[1] if part == "velocity" else args[0]
        if len(x) > memory:
            raise torch.OutOfMemoryError
        return whole(*args, **kwargs)

    if part == "extract":
        monkeypatch.setattr(type(owner), part, lambda self, *args, **kwargs: limited(*args, **kwargs))
    else:
        monkeypatch.setattr(owner, part, limited)
    before = torch.get_rng_state()
    assert [fits(trainer, size) for size in (64, 10, 9)] == [False, False, True]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("memory", "size"), [(100, 64), (40, 32), (9, 8), (0, 1)])
def test_a_batch_is_halved_on_a_gpu_until_it_fits_every_process(monkeypatch, memory, size):
    monkeypatch.setattr(image_sets, "fits", lambda trainer, size: size <= memory)
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False)
    trainer.accelerator = SimpleNamespace(device=torch.device("cuda"))
    assert image_sets.fitting_batch_size(trainer) == size
    trainer.accelerator.device = torch.device("cpu")
    assert image_sets.fitting_batch_size(trainer) == 64
    monkeypatch.setattr(image_sets, "gather_object", lambda sizes: [*sizes, 16])
    assert image_sets.fitting_batch_size(trainer) == 16
