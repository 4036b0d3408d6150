# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from trl_distreward.metrics.quadrature import elliptic_quadrature, error_bound


@pytest.mark.parametrize("ratio", [0.5, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("num_nodes", [6, 24, 60])
def test_error_of_one_number_is_at_most_the_bound_and_nearly_that(ratio, num_nodes):
    rule = elliptic_quadrature(3 * ratio, 3.0, num_nodes=num_nodes)
    numbers = torch.logspace(math.log10(rule.lower), math.log10(rule.upper), 5001, dtype=torch.float64)[:, None]
    slopes = 2 * numbers / (numbers**2 + rule.nodes**2)  # of Σ w log(a² + s²), which is a
    for weights, bound in ((rule.weights, rule.bound), (rule.coarse, rule.coarse_bound)):
        error = ((slopes * weights).sum(1) - 1).abs().max().item()
        assert 0.9 * bound - 2e-15 < error < bound + 2e-15


def test_nodes_keep_full_precision_and_mirror():
    rule = elliptic_quadrature(1e-9, 1.0, num_nodes=45)
    assert (rule.nodes.diff() > 0).all()
    torch.testing.assert_close(
        rule.nodes * rule.nodes.flip(0), torch.full((45,), 1e-9, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_bound_falls_exponentially_at_the_known_rate():
    lower, upper = 1e-5, 1.0
    rate = math.log(error_bound(lower, upper, 20) / error_bound(lower, upper, 30)) / 10
    assert rate == pytest.approx(math.pi**2 / math.log(4 * upper / lower), rel=1e-4)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-7, 1e-10])
def test_number_of_nodes_follows_from_the_tolerance(tolerance):
    rule = elliptic_quadrature(1e-5, 1.0, tolerance)
    assert rule.bound <= tolerance < error_bound(1e-5, 1.0, len(rule.nodes) - 3)


def test_errors():
    for lower, upper in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="interval"):
            elliptic_quadrature(lower, upper)
    with pytest.raises(ValueError, match="multiple of 3"):
        elliptic_quadrature(0.1, 1.0, num_nodes=10)
