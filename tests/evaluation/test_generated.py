# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.evaluation.images import project
from tests.helpers import tiny_pipeline
from trl_distreward.evaluation.features import collect_features
from trl_distreward.evaluation.generated import GeneratedImages
from trl_distreward.generation import SamplingSchedule, generate_images
from trl_distreward.policies import as_policy

SCHEDULE = SamplingSchedule(4, last_step_size=0.04)


def generated(seed=0, schedule=SCHEDULE, **kwargs):
    return GeneratedImages(as_policy(tiny_pipeline(seed)), 23, schedule, **kwargs)


def collect(source, folder):
    return collect_features(source, {"f": project}, folder, batch_size=5)


def test_images_are_those_of_the_seed():
    source = generated()
    made = np.stack([image.content for i in range(source.num_shards(5)) for image in source.shard(i, 5)])
    ((expected, _),) = generate_images(as_policy(tiny_pipeline()), torch.arange(23) % 3, SCHEDULE)
    difference = torch.from_numpy(made).int() - expected.permute(0, 2, 3, 1).int()
    assert abs(difference).max() <= 1  # batches of 5 and of 23 differ by rounding


def test_processes_share_the_shards(tmp_path, monkeypatch):
    whole = collect(generated(), tmp_path / "one")
    for rank in (0, 2):
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0, device="cpu")
        state.wait_for_everyone = lambda: None
        monkeypatch.setattr("trl_distreward.evaluation.features.PartialState", lambda state=state: state)
        with pytest.raises(FileNotFoundError):  # the second process is missing
            collect(generated(), tmp_path / "three")
    made = sorted(path.name for path in (tmp_path / "three").glob("features-*"))
    assert made == [f"features-0000{i}.safetensors" for i in (0, 3, 4)]
    monkeypatch.undo()
    for path in collect(generated(), tmp_path / "three").paths:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert len(whole.paths) == 5


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"labels": "random"}, {"schedule": SamplingSchedule(5)}, {"settings": {"dtype": "x"}}]
)
def test_images_of_other_weights_or_settings_are_not_mixed(tmp_path, other):
    collect(generated(), tmp_path / "work")
    with pytest.raises(ValueError, match="work of other settings: images was"):
        collect(generated(**other), tmp_path / "work")


def test_labels_are_balanced_or_drawn():
    assert generated().labels.tolist() == [i % 3 for i in range(23)]
    drawn, again = (GeneratedImages(as_policy(tiny_pipeline()), 3000, SCHEDULE, "random").labels for _ in range(2))
    counts = drawn.bincount()
    assert len(set(counts.tolist())) > 1 and counts.min() > 900 and torch.equal(drawn, again)
    with pytest.raises(ValueError, match="has no classes"):
        GeneratedImages(SimpleNamespace(num_conditions=None), 3, SCHEDULE)
