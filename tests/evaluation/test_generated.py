# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import tiny_pipeline
from trl_distreward.evaluation.generated import GenerationPlan, generate_shards, save_shards_as_npz
from trl_distreward.generation import SamplingSchedule, generate_images
from trl_distreward.policies import as_policy

SCHEDULE = SamplingSchedule(4, last_step_size=0.04)
PLAN = GenerationPlan(23, SCHEDULE, batch_size=5)


def all_images(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("images-*.npy"))])


def generate(folder, plan=PLAN, policy=None):
    return generate_shards(policy or as_policy(tiny_pipeline()), plan, folder, progress=False)


def test_shards_hold_the_images_of_the_seed(tmp_path):
    shards, policy = generate(tmp_path), as_policy(tiny_pipeline())
    (expected,) = (images for images, _ in generate_images(policy, torch.arange(23) % 3, SCHEDULE))
    difference = all_images(tmp_path).astype(int) - expected.permute(0, 2, 3, 1).numpy()
    assert abs(difference).max() <= 1  # in batches of 5 and of 23: rounding only
    assert len(shards) == 23 and shards.read(22).content.shape == (4, 4, 1)
    assert np.array_equal(shards.read(7).content, all_images(tmp_path)[7])


def test_processes_share_shards_out_and_missing_ones_are_made(tmp_path, monkeypatch):
    generate(tmp_path / "one")
    for rank in (0, 2):
        state = SimpleNamespace(
            process_index=rank, num_processes=3, is_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr("trl_distreward.evaluation.generated.PartialState", lambda state=state: state)
        with pytest.raises(ValueError, match=r"holds \d+ of 23 images: run the command"):
            generate(tmp_path / "three")  # the second process is missing
    made = sorted(path.name for path in (tmp_path / "three").glob("*.npy"))
    assert made == [f"images-00000{i}.npy" for i in (0, 3, 4)]
    monkeypatch.undo()
    times = {name: (tmp_path / "three" / name).stat().st_mtime_ns for name in made}
    generate(tmp_path / "three")
    assert times == {name: (tmp_path / "three" / name).stat().st_mtime_ns for name in made}
    assert np.array_equal(all_images(tmp_path / "three"), all_images(tmp_path / "one"))


def test_other_weights_or_settings_are_not_mixed(tmp_path):
    generate(tmp_path)
    with pytest.raises(ValueError, match="other settings: weights was '"):
        generate(tmp_path, policy=as_policy(tiny_pipeline(seed=1)))
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        generate(tmp_path, GenerationPlan(23, SCHEDULE, batch_size=5, seed=1))
    with pytest.raises(ValueError, match="schedule.num_steps was 4 and is 5"):
        generate(tmp_path, GenerationPlan(23, SamplingSchedule(5, last_step_size=0.04), batch_size=5))


def test_labels_are_balanced_or_drawn():
    balanced, drawn = PLAN.conditions(3), GenerationPlan(3000, SCHEDULE, labels="random").conditions(3)
    assert balanced.tolist() == [i % 3 for i in range(23)]
    counts = drawn.bincount()
    assert len(set(counts.tolist())) > 1 and counts.min() > 900
    assert torch.equal(drawn, GenerationPlan(3000, SCHEDULE, labels="random").conditions(3))
    with pytest.raises(ValueError, match="labels='some' is unknown"):
        GenerationPlan(10, SCHEDULE, labels="some")
    with pytest.raises(ValueError, match="no classes"):
        PLAN.conditions(None)


def test_sample_file_is_adms(tmp_path):
    shards = generate(tmp_path / "work")
    save_shards_as_npz(shards, tmp_path / "sample.npz", PLAN.conditions(3))
    with np.load(tmp_path / "sample.npz") as sample:
        assert sample["arr_0"].shape == (23, 4, 4, 3) and sample["arr_0"].dtype == np.uint8
        assert np.array_equal(sample["arr_0"][..., :1], all_images(tmp_path / "work"))
        assert sample["arr_1"].tolist() == PLAN.conditions(3).tolist()
