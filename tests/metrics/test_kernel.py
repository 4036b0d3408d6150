# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import itertools

import pytest
import torch
from safetensors.torch import save_file

from trl_distreward.metrics.frechet import FrechetDistance
from trl_distreward.metrics.kernel import KernelDistance
from trl_distreward.metrics.precision import full_precision
from trl_distreward.metrics.statistics import FeatureStatistics

N, D = 24, 5
KINDS = {
    "kid": {},
    "kid, biased": {"unbiased": False},
    "quadratic": {"degree": 2, "gamma": 0.3, "coef": 0.5},
    "gaussian": {"kernel": "gaussian", "bandwidths": (0.7, 2.0, 50.0)},
    "gaussian, biased": {"kernel": "gaussian", "bandwidths": (0.7, 2.0, 50.0), "unbiased": False},
}


def sample(count, seed, dimension=D, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


REAL, GENERATED = sample(30, 0, offset=1.0), sample(N, 1, offset=0.7)
NEW = sample(12, 2).view(3, 4, D)
INDICES = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s))[:4] for s in range(3)])


def kernel_of(x, y, kernel="polynomial", degree=3, gamma=None, coef=1.0, bandwidths=(), **_):
    if kernel == "polynomial":
        return ((x @ y.T) * (1 / x.shape[1] if gamma is None else gamma) + coef) ** degree
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
def test_every_value_is_a_full_recompute(kind):
    distance = KernelDistance(REAL, **kind)
    assert distance.features is None and distance.dimension == D
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
    deleted, added = distance.delete_one(torch.arange(N)), distance.add_one(NEW[0])
    assert deleted.tolist() == pytest.approx([naive(without(GENERATED, i), **kind) - value for i in range(N)], **close)
    expected = [naive(torch.cat([GENERATED, row[None]]), **kind) - value for row in NEW[0]]
    assert added.tolist() == pytest.approx(expected, **close)


def test_unbiased_polynomial_is_the_textbook_kid():
    def k(x, y):
        return (x @ y / D + 1) ** 3

    kid = sum(k(x, y) for x, y in itertools.permutations(GENERATED, 2)) / (N * (N - 1))
    kid += sum(k(x, y) for x, y in itertools.permutations(REAL, 2)) / (30 * 29)
    kid -= 2 * sum(k(x, y) for x in GENERATED for y in REAL) / (N * 30)
    assert KernelDistance(REAL).fit(GENERATED).value == pytest.approx(kid.item(), rel=1e-12)


@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
def test_biased_is_never_negative_and_unbiased_is_zero_on_average(kernel):
    biased = [KernelDistance(sample(20, 2 * s), kernel, unbiased=False).fit(sample(9, 2 * s + 1)) for s in range(60)]
    assert min(distance.value for distance in biased) > 0
    assert KernelDistance(REAL, kernel, unbiased=False).fit(REAL).value == pytest.approx(0, abs=1e-13)
    unbiased = [KernelDistance(sample(20, 2 * s), kernel).fit(sample(9, 2 * s + 1)).value for s in range(60)]
    values = torch.tensor(unbiased)
    assert abs(values.mean()) < 3 * values.std() / 60**0.5 and values.min() < 0


def test_wide_gaussians_keep_their_digits():
    """For σ far above all distances MMD² tends to |difference of means|² / σ², which 1 - k would round away."""
    distance = KernelDistance(REAL, "gaussian", unbiased=False, bandwidths=(1e6,)).fit(GENERATED)
    assert distance.value == pytest.approx((REAL.mean(0) - GENERATED.mean(0)).square().sum().item() / 1e12, rel=1e-8)


def test_median_heuristic():
    distance = KernelDistance(REAL, "gaussian")
    pairs = torch.pdist(REAL)
    assert distance.bandwidths == pytest.approx([f * pairs.median().item() for f in (0.5, 1, 2)])
    assert KernelDistance(REAL).bandwidths == ()
    mostly_equal = torch.cat([torch.zeros(20, 1), torch.ones(4, 1)])
    with pytest.raises(ValueError, match="pass bandwidths"):
        KernelDistance(mostly_equal, "gaussian")


@pytest.mark.parametrize("kind", ["kid", "gaussian"])
def test_chunks_change_nothing(kind):
    def everything():
        distance = KernelDistance(REAL, **KINDS[kind]).fit(GENERATED)
        yield torch.tensor(distance.value)
        yield distance.replaced(INDICES, NEW)
        yield distance.leave_one_in(INDICES, NEW)
        yield distance.delete_one(torch.arange(N))
        yield distance.add_one(NEW[0])

    whole = list(everything())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelDistance, "memory_budget", 1)
        for small, large in zip(everything(), whole, strict=True):
            torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float32_products_are_close(kind):
    """Features far from the origin, as Inception's: centring keeps the digits that float32 would lose."""
    real, generated, new = (x.float() + 10 for x in (REAL, GENERATED, NEW))
    single = KernelDistance(real, dtype=torch.float32, **kind).fit(generated)
    double = KernelDistance(real, dtype=torch.float64, **kind).fit(generated)
    scale = abs(double.value)
    assert single.value == pytest.approx(double.value, abs=1e-6 * scale)
    for method, arguments in [("replaced", (INDICES, new)), ("leave_one_in", (INDICES, new)), ("add_one", (new[0],))]:
        difference = getattr(single, method)(*arguments) - getattr(double, method)(*arguments)
        assert difference.abs().max() < 1e-6 * scale


def test_large_real_sets_take_float32(monkeypatch):
    assert KernelDistance(REAL).dtype == torch.float64
    monkeypatch.setattr(KernelDistance, "float64_elements", REAL.numel() - 1)
    assert KernelDistance(REAL).dtype == torch.float32


def test_products_stay_float32_where_training_asked_for_less():
    backend = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision():
                product = REAL.float() @ REAL.float().T
                assert product.dtype == torch.float32
                assert getattr(backend, "fp32_precision", "ieee") == "ieee"
            assert (REAL.float() @ REAL.float().T).dtype == torch.bfloat16
        assert getattr(backend, "fp32_precision", "bf16") == "bf16"  # as it was
    finally:
        torch.set_float32_matmul_precision(before)


def test_real_features_from_a_file(tmp_path):
    save_file({"features": REAL}, tmp_path / "real.safetensors")
    assert KernelDistance(tmp_path / "real.safetensors").fit(GENERATED).value == pytest.approx(naive(GENERATED))
    FeatureStatistics.from_features(REAL).save(tmp_path / "moments.safetensors")
    with pytest.raises(ValueError, match="no 'features'"):
        KernelDistance(str(tmp_path / "moments.safetensors"))
    with pytest.raises(FileNotFoundError, match="no features file"):
        KernelDistance(tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        KernelDistance(tmp_path / "broken.safetensors")


def test_errors():
    with pytest.raises(TypeError, match="not with their moments"):
        KernelDistance(FeatureStatistics.from_features(REAL))
    with pytest.raises(TypeError, match="is a list"):
        KernelDistance([1.0])
    cases = [
        ({"kernel": "cubic"}, "kernel='cubic'"),
        ({"bandwidths": (1.0,)}, "set kernel='gaussian'"),
        ({"kernel": "gaussian", "bandwidths": (1.0, 0.0)}, "positive"),
        ({"kernel": "gaussian", "bandwidths": ()}, "one or more"),
        ({"degree": 0}, "degree=0"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"dtype": torch.bfloat16}, "too coarse"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            KernelDistance(REAL, **arguments)
    with pytest.raises(ValueError, match="NaN or infinite"):
        KernelDistance(torch.full((4, 2), float("nan")))
    with pytest.raises(ValueError, match="at least 2"):
        KernelDistance(REAL[:1])
    distance = KernelDistance(REAL)
    for call in (lambda: distance.replaced(INDICES, NEW), lambda: distance.delete_one(INDICES[0])):
        with pytest.raises(ValueError, match="call fit"):
            call()
    with pytest.raises(ValueError, match="dimension 4"):
        distance.fit(GENERATED[:, :4])
    with pytest.raises(ValueError, match="at least 2"):
        distance.fit(GENERATED[:1])
    with pytest.raises(ValueError, match="at least 3"):
        distance.fit(GENERATED[:2]).delete_one(torch.tensor([0]))
    distance.fit(GENERATED)
    with pytest.raises(ValueError, match="same row twice"):
        distance.replaced(torch.tensor([[0, 0]]), NEW[:1, :2])
    with pytest.raises(ValueError, match="0 to 23"):
        distance.replaced(torch.tensor([[N]]), NEW[:1, :1])
    with pytest.raises(ValueError, match="0 to 23"):
        distance.delete_one(torch.tensor([N]))
    with pytest.raises(ValueError, match="whole numbers"):
        distance.delete_one(torch.tensor([0.0]))


def test_interface_matches_the_frechet_distance():
    kernel, frechet = KernelDistance(REAL), FrechetDistance(FeatureStatistics.from_features(REAL))
    for distance in (kernel, frechet):
        assert distance.features is None and distance.dimension == D
        assert distance.fit(GENERATED) is distance
        assert len(distance.features) == N
        assert distance.replaced(INDICES, NEW).shape == (3,)
