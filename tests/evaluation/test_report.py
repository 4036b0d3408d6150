# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_distreward.evaluation.report import check_comparable, markdown_table


def report(model="base", images=50_000, norm=10.0, resize="tensorflow", image_resize=None, **metrics):
    metrics = metrics or {"frechet": 8.3, "kid": 0.004, "kid_std": 0.0005, "recall": 0.57}
    real = {"path": "stats/imagenet.npz", "count": 10_000, "mean_norm": norm}
    result = {"extractor": "inception", "resize": resize, "real": real, "metrics": metrics}
    return {"model": model, "images": images, "resize": image_resize, "results": [result]}


def test_table_shows_every_number_once():
    table = markdown_table(report())
    assert table.splitlines()[0] == "| metric | features | base |"
    assert "| FID | inception, tensorflow | 8.3 |" in table and "0.004 ± 0.0005" in table
    assert "50,000 images. Real data: imagenet.npz (10000 images)." in table and table.count("0.57") == 1


def test_changes_are_in_percent_of_the_first_as_in_table_4():
    before = report(frechet=8.30, kid=0.004, recall=0.0, precision=0.60)
    after = report("tuned", frechet=5.77, kid=0.00186, recall=0.1, density=1.0)
    check_comparable(before, after)
    assert markdown_table(before, after).splitlines()[:5] == [
        "| metric | features | base | tuned | change |",
        "| --- | --- | ---: | ---: | ---: |",
        "| FID | inception, tensorflow | 8.3 | 5.77 | -30.5 % |",
        "| kid | inception, tensorflow | 0.004 | 0.00186 | -53.5 % |",
        "| recall | inception, tensorflow | 0 | 0.1 | undefined |",
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (report(images=5_000), "their images are 50000 and 5000"),
        (report(image_resize=256), "their resize are None and 256"),
        (report(norm=10.1), "their real images differ, in the features of inception"),
    ],
)
def test_reports_that_differ_in_more_than_the_model_are_not_compared(other, message):
    with pytest.raises(ValueError, match=message):
        check_comparable(report(), other)
