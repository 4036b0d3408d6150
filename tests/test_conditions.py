# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features

from trl_distreward.conditions import (
    column_of,
    conditions_of_slots,
    members_of,
    proportional_counts,
    proportional_subsets,
    rows_of_slots,
)

SIZES = torch.tensor([50, 31, 1, 17, 1])


def test_counts_are_shares_rounded_and_exact_in_expectation():
    for total in (1, 7, 40, 100, 256):
        share = total * SIZES / 100
        draws = torch.stack([proportional_counts(SIZES, total, torch.Generator().manual_seed(i)) for i in range(2000)])
        assert (draws.sum(dim=1) == total).all()
        assert (draws >= share.floor()).all() and (draws <= share.ceil()).all()
        assert draws.double().mean(dim=0) == pytest.approx(share.tolist(), abs=5 * 0.5 / 2000**0.5)


def test_subsets_have_rounded_shares_each_and_together():
    for count, size in ((16, 8), (3, 33), (256, 1)):
        counts = proportional_subsets(SIZES, count, size, torch.Generator().manual_seed(0))
        assert counts.shape == (count, 5) and (counts.sum(dim=1) == size).all()
        for drawn, total in ((counts, size), (counts.sum(dim=0), count * size)):
            share = total * SIZES / 100
            assert (drawn >= share.floor()).all() and (drawn <= share.ceil()).all()


def test_rows_of_an_incomplete_round_are_in_proportion():
    strata = ["many"] * 60 + ["few"] * 20 + ["some"] * 40
    for count, many, few, some in ((30, 15, 5, 10), (150, 75, 25, 50)):
        rows = rows_of_slots(120, count, 3, strata)
        found = [strata[row] for row in rows]
        assert [found.count(name) for name in ("many", "few", "some")] == [many, few, some]
        counts = rows.bincount(minlength=120)
        assert counts.max() - counts.min() <= 1
        assert torch.equal(rows, rows_of_slots(120, count, 3, strata))
    assert torch.equal(rows_of_slots(120, 240, 3, strata), rows_of_slots(120, 240, 3))


def test_strata_held_as_tensors_are_the_same_strata():
    labels = [0, 1, 1, 0, 2, 1, 0, 1, 2, 1]
    expected = [m.tolist() for m in members_of(labels)]
    tensors = torch.tensor(labels)
    dataset = Dataset.from_dict({"topic": labels})
    for held in (tensors, list(tensors), dataset.with_format("torch")["topic"], dataset.with_format("numpy")["topic"]):
        assert [m.tolist() for m in members_of(held)] == expected
    for rows in (dataset.with_format("torch"), [{"topic": x} for x in tensors]):
        assert column_of(rows, "topic") == labels


# ---- columns of conditions ----

CLASSES = SimpleNamespace(num_conditions=4, check_conditions=lambda labels: None)
PROMPTS = SimpleNamespace(num_conditions=None, check_conditions=lambda prompts: None)


@pytest.mark.parametrize("label", ["label", "labels", "class_label", "class_labels"])
@pytest.mark.parametrize("text", ["prompt", "prompts", "text", "caption"])
def test_labels_and_prompts_are_found_side_by_side(label, text):
    dataset = Dataset.from_dict({text: ["a", "b", "c"], label: [3, 1, 2], "other": [0, 0, 0]})
    assert sorted(conditions_of_slots(CLASSES, dataset, 3, 0).tolist()) == [1, 2, 3]
    assert sorted(conditions_of_slots(PROMPTS, dataset, 3, 0)) == ["a", "b", "c"]


def test_class_label_features_and_encoded_columns_are_labels():
    names = Dataset.from_dict({"label": ["dog", "cat", "dog"]})
    with pytest.raises(ValueError, match="holds 'dog': labels are integers 0…K−1.*class_encode_column.'label'."):
        conditions_of_slots(CLASSES, names, 3, 0)
    assert sorted(conditions_of_slots(CLASSES, names.class_encode_column("label"), 3, 0).tolist()) == [0, 1, 1]
    typed = Dataset.from_dict({"label": [1, 0]}, Features({"label": ClassLabel(names=["cat", "dog"])}))
    assert sorted(conditions_of_slots(CLASSES, typed, 2, 0).tolist()) == [0, 1]


@pytest.mark.parametrize(
    "policy, dataset, message",
    [
        (CLASSES, {"label": [0], "class_label": [0]}, "label, class_label, each of which may hold class labels"),
        (PROMPTS, {"text": ["a"], "caption": ["b"]}, "text, caption, each of which may hold prompts.*remove_columns"),
        (CLASSES, {"fine": [0]}, r"\(fine\) has none that may hold class labels.*rename one to 'label'"),
        (PROMPTS, {"sentence": ["a"]}, r"\(sentence\) has none that may hold prompts.*rename one to 'prompt'"),
        (CLASSES, {"label": [0.5]}, "integers 0…K−1"),
        (CLASSES, {"label": [0, None]}, "integers 0…K−1"),
        (PROMPTS, {"prompt": []}, "the dataset is empty"),
    ],
)
def test_what_holds_no_conditions_is_refused(policy, dataset, message):
    with pytest.raises(ValueError, match=message):
        conditions_of_slots(policy, Dataset.from_dict(dataset), 3, 0)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (["a cat", "a dog"], r"list of str: pass a Dataset, Dataset.from_dict\({'prompt': \[...\]}\)"),
        ([], "the dataset is empty"),
        ("a cat", "the dataset is a str"),
        (iter("ab"), "which has a length"),
        (DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}), r"has splits: .*dataset\['train'\]"),
    ],
)
def test_what_is_no_dataset_is_refused_with_what_to_pass(dataset, message):
    with pytest.raises(ValueError, match=message):
        conditions_of_slots(PROMPTS, dataset, 3, 0)
