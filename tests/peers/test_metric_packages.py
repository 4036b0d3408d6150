# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Our metrics beside those of other packages, on the same features, logits and images."""

import contextlib
import importlib
import sys
from unittest.mock import MagicMock

import evaluate
import numpy as np
import pytest
import torch

from tests.test_metrics_hub import HUB, caches  # noqa: F401
from trl_distreward import InceptionV3
from trl_distreward.metrics import inception_score
from trl_distreward.metrics.kernel import KernelDistance

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(0)


def features(count, shift):
    mixed = torch.randn(64, 64, generator=GENERATOR, dtype=torch.float64) / 8
    rows = torch.randn(count, 64, generator=GENERATOR, dtype=torch.float64) @ mixed + shift
    return rows.float().double()  # modules of `evaluate` keep float32


REAL, GENERATED = features(700, 0.0), features(600, 0.2)
LOGITS = 2 * torch.randn(600, 20, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randint(0, 256, (2, 3, 64, 48), generator=GENERATOR).to(torch.uint8)


class Unchanged(torch.nn.Module):
    """torchmetrics' feature network where features are given."""

    num_features = 64

    def forward(self, rows):
        return rows


@contextlib.contextmanager
def no_torchvision():
    """Something to import in place of torchvision, of which these metrics need nothing."""
    parts = ["", ".transforms", ".transforms.functional", ".datasets", ".models", ".models.utils"]
    names = [] if importlib.util.find_spec("torchvision") else [f"torchvision{part}" for part in parts]
    sys.modules |= {name: MagicMock() for name in names}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def package(name, module):
    pytest.importorskip(name) if name in ("prdc", "torchmetrics") else None
    with no_torchvision():
        return pytest.importorskip(module)


def torchmetric(name, batches, **options):
    with no_torchvision():
        pytest.importorskip("torch_fidelity")  # imported by it
    module, _, kind = name.rpartition(".")
    metric = getattr(pytest.importorskip(f"torchmetrics.image.{module}"), kind)(feature=Unchanged(), **options)
    metric.set_dtype(torch.float64)
    for rows, given in batches:
        metric.update(rows, **given)
    return metric.compute()


def ours(name, real=REAL, **options):
    return evaluate.load(str(HUB / name)).compute(predictions=GENERATED, references=real, **options)


def moments(rows):
    return rows.mean(dim=0).numpy(), np.cov(rows.numpy(), rowvar=False)


def by_torch_fidelity():
    fid = package("torch_fidelity", "torch_fidelity.metric_fid")
    statistics = [fid.fid_features_to_statistics(rows) for rows in (GENERATED, REAL)]
    return fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]


def by_pytorch_fid():
    score = package("pytorch_fid", "pytorch_fid.fid_score")
    return score.calculate_frechet_distance(*moments(GENERATED), *moments(REAL))


BOTH = [(REAL, {"real": True}), (GENERATED, {"real": False})]
FRECHET = {
    "torch-fidelity": (by_torch_fidelity, 1e-11),
    "pytorch-fid": (by_pytorch_fid, 1e-11),
    "clean-fid": (
        lambda: package("cleanfid", "cleanfid.fid").fid_from_feats(*map(np.asarray, (GENERATED, REAL))),
        1e-11,
    ),
    "torchmetrics": (
        lambda: torchmetric("fid.FrechetInceptionDistance", BOTH, input_img_size=(64,)).item(),
        1e-11,
    ),
    # which iterates for a square root of a matrix that is not symmetric
    "piq": (lambda: package("piq", "piq").FID().compute_metric(GENERATED, REAL).item(), 1e-3),
}


@pytest.mark.parametrize("name", FRECHET)
def test_frechet_distance(name):
    value, tolerance = FRECHET[name]
    assert ours("frechet_distance")["frechet_distance"] == pytest.approx(value(), rel=tolerance)


def test_kernel_distance_of_the_same_subsets():
    kid = package("torch_fidelity", "torch_fidelity.metric_kid")
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "verbose": False}
    options |= {"kid_kernel_poly_coef0": 1, "kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 5}
    expected = kid.kid_features_to_metric(GENERATED, REAL, **options)
    found = ours("kernel_distance", num_subsets=20, subset_size=100, seed=5)
    assert found["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-12)
    assert found["kernel_distance_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-12)


SAME_SIZE = [(REAL[:600], {"real": True}), BOTH[1]]
WHOLE_SETS = {
    "clean-fid": lambda: package("cleanfid", "cleanfid.fid").kernel_distance(
        *map(np.asarray, (REAL[:600], GENERATED)), num_subsets=1, max_subset_size=600
    ),
    "torchmetrics": lambda: torchmetric("kid.KernelInceptionDistance", SAME_SIZE, subsets=1, subset_size=600)[
        0
    ].item(),
    "piq": lambda: package("piq", "piq").KID().compute_metric(GENERATED, REAL[:600]).item(),
}


@pytest.mark.parametrize("name", WHOLE_SETS)
def test_kernel_distance_of_whole_sets(name):
    value = KernelDistance(REAL[:600]).fit(GENERATED).value
    assert value == pytest.approx(WHOLE_SETS[name](), rel=1e-12)


def test_inception_score():
    isc = package("torch_fidelity", "torch_fidelity.metric_isc")
    expected = isc.isc_features_to_metric(LOGITS, splits=10, shuffle=True, rng_seed=3)
    names = ("inception_score_mean", "inception_score_std")
    assert inception_score(LOGITS, 10, seed=3) == pytest.approx([expected[name] for name in names], rel=1e-12)


def test_inception_score_of_other_packages():
    alone = torchmetric("inception.InceptionScore", [(LOGITS, {})], splits=1)[0].item()
    assert inception_score(LOGITS, 1)[0] == pytest.approx(alone, rel=1e-12)
    found = package("piq", "piq").isc.inception_score(LOGITS, 10)[0].item()
    assert inception_score(LOGITS, 10)[0] == pytest.approx(found, rel=1e-12)


def test_precision_recall_density_coverage():
    expected = package("prdc", "prdc").compute_prdc(REAL.numpy(), GENERATED.numpy(), 5)
    assert ours("prdc", nearest_k=5) == expected


def test_precision_and_recall_of_other_packages():
    prc = package("torch_fidelity", "torch_fidelity.metric_prc")
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "verbose": False}
    expected, found = prc.prc_features_to_metric(GENERATED, REAL, **options), ours("prdc", nearest_k=3)
    assert {name: found[name] for name in ("precision", "recall")} == pytest.approx(
        {name: expected[name] for name in ("precision", "recall")},
        rel=1e-6,  # which are float32
    )
    pair = [value.item() for value in package("piq", "piq").PR(nearest_k=5).compute_metric(REAL, GENERATED)]
    found = ours("prdc", nearest_k=5)
    assert [found["precision"], found["recall"]] == pytest.approx(pair, rel=1e-6)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch", "legacy_tensorflow"])
def test_input_of_the_network_by_clean_fids_mode(mode):
    network, scaled = InceptionV3(resize=mode.removeprefix("legacy_")), IMAGES.float()
    if mode == "legacy_tensorflow":  # inside of its network, a TorchScript archive that torch-fidelity rebuilds
        resize = package("torch_fidelity", "torch_fidelity.interpolate_compat_tensorflow")
        expected = resize.interpolate_bilinear_2d_like_tensorflow1x(scaled, size=(299, 299), align_corners=False)
    else:
        resizer = package("cleanfid", "cleanfid.resize").build_resizer(mode)
        arrays = [resizer(image.permute(1, 2, 0).numpy()) for image in IMAGES]
        expected = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    found = network.prepare(IMAGES)
    pixels = (found + 1) / 2 * 255 if mode == "legacy_pytorch" else found * 128 + 128
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)
