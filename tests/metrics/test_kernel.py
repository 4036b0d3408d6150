# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_distreward.metrics.kernel import KernelDistance
from trl_distreward.metrics.statistics import FeatureStatistics

N, D = 24, 5
KINDS = {
    "kid": {},
    "kid, biased": {"unbiased": False},
    "gaussian": {"kernel": "gaussian", "bandwidths": (0.7, 2.0, 50.0)},
    "gaussian, biased": {"kernel": "gaussian", "bandwidths": (0.7, 2.0, 50.0), "unbiased": False},
}


def sample(count, seed, dimension=D, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


REAL, GENERATED = sample(30, 0, offset=1.0), sample(N, 1, offset=0.7)
NEW = sample(12, 2).view(3, 4, D)
INDICES = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s))[:4] for s in range(3)])


def kernel_of(x, y, kernel="polynomial", bandwidths=()):
    if kernel == "polynomial":
        return (x @ y.T / x.shape[1] + 1) ** 3
    squares = (x[:, None] - y[None]).square().sum(-1)
    return torch.stack([torch.exp(-squares / (2 * b**2)) for b in bandwidths]).mean(0)


def naive(generated, real=REAL, unbiased=True, **kind):
    """Gretton et al. (JMLR 2012), Eq. 3 and its biased counterpart, pair by pair."""
    total = 0.0
    for x in (generated, real):
        values = kernel_of(x, x, **kind)
        total += (values.sum() - values.trace()) / (len(x) * (len(x) - 1)) if unbiased else values.mean()
    return (total - 2 * kernel_of(generated, real, **kind).mean()).item()


def without(rows, i):
    return torch.cat([rows[:i], rows[i + 1 :]])


def updated(b):
    changed = GENERATED.clone()
    changed[INDICES[b]] = NEW[b]
    return changed


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_value_equals_a_full_recompute(kind):
    distance = KernelDistance(REAL, **kind)
    assert distance.dimension == D
    distance.fit(GENERATED)
    close = {"rel": 1e-10, "abs": 1e-13}
    value = naive(GENERATED, **kind)
    assert isinstance(distance.value, float) and distance.value == pytest.approx(value, **close)
    replaced, credits = distance.replaced(INDICES, NEW), distance.leave_one_in(INDICES, NEW)
    assert replaced.dtype == credits.dtype == torch.float64
    assert replaced.shape == (3,) and credits.shape == (3, 4)
    for b in range(3):
        changed = updated(b)
        assert replaced[b].item() == pytest.approx(naive(changed, **kind), **close)
        for j, row in enumerate(INDICES[b].tolist()):
            expected = naive(changed, **kind) - naive(without(changed, row), **kind)
            assert credits[b, j].item() == pytest.approx(expected, **close)
    deleted = distance.delete_one(torch.arange(N))
    assert deleted.tolist() == pytest.approx([naive(without(GENERATED, i), **kind) - value for i in range(N)], **close)


def test_wide_gaussians_keep_their_digits():
    """For σ far above all distances MMD² tends to |difference of means|² / σ², which 1 - k would round away."""
    distance = KernelDistance(REAL, "gaussian", unbiased=False, bandwidths=(1e6,)).fit(GENERATED)
    assert distance.value == pytest.approx((REAL.mean(0) - GENERATED.mean(0)).square().sum().item() / 1e12, rel=1e-8)


def test_bandwidths_are_multiples_of_the_median_distance():
    median = torch.pdist(REAL).median().item()
    assert KernelDistance(REAL, "gaussian").bandwidths == pytest.approx([f * median for f in (0.5, 1, 2)])


@pytest.mark.parametrize("kind", ["kid", "gaussian"])
def test_chunks_change_nothing(kind, monkeypatch):
    def everything():
        distance = KernelDistance(REAL, **KINDS[kind]).fit(GENERATED)
        both = distance.replaced(INDICES, NEW), distance.leave_one_in(INDICES, NEW)
        return torch.tensor(distance.value), *both, distance.delete_one(torch.arange(N))

    whole = everything()
    monkeypatch.setattr(KernelDistance, "memory_budget", 1)
    for small, large in zip(everything(), whole, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float32_products_of_large_sets_are_close(kind, monkeypatch):
    """Features far from the origin, like Inception's: centring keeps the digits that float32 would lose."""
    real, generated, new = (x.float() + 10 for x in (REAL, GENERATED, NEW))
    double = KernelDistance(real, **kind).fit(generated)
    monkeypatch.setattr(KernelDistance, "float64_elements", REAL.numel() - 1)
    single = KernelDistance(real, **kind).fit(generated)
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    scale = abs(double.value)
    assert single.value == pytest.approx(double.value, abs=1e-6 * scale)
    for method in ("replaced", "leave_one_in"):
        difference = getattr(single, method)(INDICES, new) - getattr(double, method)(INDICES, new)
        assert difference.abs().max() < 1e-6 * scale


@pytest.mark.parametrize(
    ("real", "options", "message"),
    [
        (FeatureStatistics.from_features(REAL), {}, "got FeatureStatistics"),
        (REAL, {"kernel": "cubic"}, "kernel='cubic'"),
        (torch.full((4, 2), torch.nan), {}, "NaN or infinite"),
        (REAL[:1], {}, "at least 2"),
        (torch.cat([torch.zeros(20, 1), torch.ones(4, 1)]), {"kernel": "gaussian"}, "pass bandwidths"),
    ],
)
def test_unusable_real_data_and_kernels_are_refused(real, options, message):
    with pytest.raises(ValueError, match=message):
        KernelDistance(real, **options)
