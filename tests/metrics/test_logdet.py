# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from trl_distreward.metrics.logdet import elliptic_quadrature, error_bound, factorize


@pytest.mark.parametrize("count", [1, 2])
def test_factors_at_any_number_of_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(128, 201, 260, generator=generator, dtype=torch.float64) / 40
        grams = rows @ rows.mT
        factors = factorize(grams, 100)
    finally:
        torch.set_num_threads(before)
    assert not factors.failed.any()
    signs = torch.ones(201, dtype=torch.float64)
    signs[100:] = -1
    whole = torch.zeros(128, 201, 201, dtype=torch.float64)
    whole[:, :100, :100], whole[:, 100:, :100], whole[:, 100:, 100:] = factors.added, factors.cross.mT, factors.removed
    torch.testing.assert_close(whole @ torch.diag(signs) @ whole.mT, grams + torch.diag(signs), rtol=0, atol=1e-12)
    vectors = torch.randn(128, 201, 2, generator=generator, dtype=torch.float64)
    forms = factors.inverse_forms(vectors[:, :100], vectors[:, 100:])
    for b in (0, 127):
        expected = (vectors[b] * torch.linalg.solve(grams[b] + torch.diag(signs), vectors[b])).sum(0)
        torch.testing.assert_close(forms[b], expected)


@pytest.mark.parametrize("ratio", [0.5, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-7, 1e-10])
def test_error_of_one_number_is_just_below_the_bound(ratio, tolerance):
    rule = elliptic_quadrature(3 * ratio, 3.0, tolerance)
    assert rule.bound <= tolerance < error_bound(rule.lower, rule.upper, max(len(rule.nodes) - 3, 1))
    numbers = torch.logspace(math.log10(rule.lower), math.log10(rule.upper), 5001, dtype=torch.float64)[:, None]
    slopes = 2 * numbers / (numbers**2 + rule.nodes**2)  # of Σ w log(a² + s²), which is a
    for weights, bound in ((rule.weights, rule.bound), (rule.coarse, rule.coarse_bound)):
        error = ((slopes * weights).sum(1) - 1).abs().max().item()
        assert 0.9 * bound - 2e-15 < error < bound + 2e-15
