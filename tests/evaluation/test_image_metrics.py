# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from tests.helpers import real_images, tiny_trainer
from tests.runs import Rising
from trl_distreward.evaluation.image_metrics import MeanScore


def test_a_plain_function_is_averaged_over_all_evaluated_images(tmp_path):
    seen = []

    async def right(images, labels):
        seen.append(labels)
        return [None if label == 0 else float(label == 2) for label in labels]

    trainer = tiny_trainer(tmp_path, eval_metrics={"acc": right, "rising": Rising()}, num_eval_images=22)
    del seen[:]
    values = trainer.evaluate()
    labels = torch.cat(seen[: len(seen) // 2])
    assert torch.equal(labels, trainer.eval_sets[""])
    assert values["eval_ode_acc"] == pytest.approx((labels == 2).sum().item() / (labels > 0).sum().item())


def test_mean_scores_take_prompts():
    def length(images, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    metric = MeanScore(length)
    metric.update(real_images(2), ["a", "abc"])
    metric.update(real_images(1), ["abcde"])
    assert metric.compute() == 3.0


@pytest.mark.parametrize("metric", [MeanScore, "accuracy", 3, None])
def test_other_objects_are_told_what_a_metric_is(tmp_path, metric):
    with pytest.raises(ValueError, match=r"eval_metrics\['acc'\] is .*reset\(\), update\(images, conditions\)"):
        tiny_trainer(tmp_path, eval_metrics={"acc": metric})
