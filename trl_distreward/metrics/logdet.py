# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Log-determinants of low-rank changes `A' = A + W₊ᵀW₊ - W₋ᵀW₋`, at many shifts and for many subsets at once.

In the eigenbasis of A, with `M = W (Λ + s²)⁻¹ Wᵀ` and `C = diag(I, -I)`: `det[(A' + s²)(A + s²)⁻¹] = det(I + MC)`, a
determinant of the change's rank (Sylvester). Only Cholesky factors are taken: torch 2.13's batched `slogdet`, `inv`
and `lu_factor` are silently wrong on CPU with two threads or more, for matrices of 151 rows and more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: no TF32 on CUDA and no bfloat16 on CPU, whatever the user's settings.

    TF32 Gram matrices cost 0.1 % of the rewards' standard deviation, bfloat16 ones 4 %.
    """
    places: list[Any] = [torch.backends.cuda.matmul]
    name, exact = "allow_tf32", False
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        places.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        name, exact = "fp32_precision", "ieee"  # type: ignore[assignment]
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def gram_matrices(rows: Tensor, scales: Tensor) -> Tensor:
    """
    `rows · diag(scales[j]) · rowsᵀ` for every j, returned in float64; the products are in the rows' dtype.

    Args:
        rows (`torch.Tensor` of shape `(B, r, d)`): `W` for each of B subsets.
        scales (`torch.Tensor` of shape `(J, d)`): for instance `1 / (λ + s_j²)`.

    Returns:
        `torch.Tensor` of shape `(B, J, r, r)`.
    """
    batch, rank, _ = rows.shape
    scales = scales.to(rows.dtype)
    result = rows.new_empty(batch, len(scales), rank, rank, dtype=torch.float64)
    if rank <= 7:  # products of pairs of rows once, instead of scaled copies of the rows per shift
        first, second = torch.tril_indices(rank, rank, device=rows.device)
        pairs = ((rows[:, first] * rows[:, second]) @ scales.T).double()  # (B, p, J)
        result[:, :, first, second] = result[:, :, second, first] = pairs.mT
        return result
    scaled = torch.empty_like(rows)
    for j, scale in enumerate(scales):
        torch.mul(rows, scale, out=scaled)
        result[:, j] = scaled @ rows.mT
    return result


class Factors(NamedTuple):
    """
    `C + M = [[L₁, 0], [Tᵀ, L₂]] C [[L₁, 0], [Tᵀ, L₂]]ᵀ` for grams M `(..., n + k, n + k)`, n rows added and k removed.

    Attributes:
        added (`torch.Tensor` of shape `(..., n, n)`): L₁.
        cross (`torch.Tensor` of shape `(..., n, k)`): T.
        removed (`torch.Tensor` of shape `(..., k, k)`): L₂.
        failed (`torch.Tensor` of shape `(...,)`, bool): a factor does not exist.
    """

    added: Tensor
    cross: Tensor
    removed: Tensor
    failed: Tensor

    @property
    def rise(self) -> Tensor:
        """`log det(I + M₊₊) >= 0`, what the added rows contribute."""
        return 2 * self.added.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def fall(self) -> Tensor:
        """`-log det(I - M₋₋ + TᵀT) >= 0`, what the removed rows take away thereafter."""
        return -2 * self.removed.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def inverse_forms(self, vectors_added: Tensor, vectors_removed: Tensor) -> Tensor:
        """`vᵀ (C + M)⁻¹ v` for the columns v of `(..., n, m)` above `(..., k, m)`; `(..., m)`."""
        top = torch.linalg.solve_triangular(self.added, vectors_added, upper=False)
        rest = vectors_removed - self.cross.mT @ top
        bottom = torch.linalg.solve_triangular(self.removed, rest, upper=False)
        return top.square().sum(-2) - bottom.square().sum(-2)


def factorize(grams: Tensor, added: int) -> Factors:
    """
    Factors of grams M `(..., n + k, n + k)` whose first `added` rows belong to rows added.

    Positive rows first, negative ones after: both factors are positive definite, because `A + W₊ᵀW₊` and `A'` are.
    """
    plus = grams[..., :added, :added].clone()
    plus.diagonal(dim1=-2, dim2=-1).add_(1)
    upper, info_upper = torch.linalg.cholesky_ex(plus)
    cross = torch.linalg.solve_triangular(upper, grams[..., :added, added:], upper=False)
    minus = cross.mT @ cross - grams[..., added:, added:]
    minus.diagonal(dim1=-2, dim2=-1).add_(1)
    lower, info_lower = torch.linalg.cholesky_ex(minus)
    return Factors(upper, cross, lower, (info_upper != 0) | (info_lower != 0))


def eigenvalues_above(grams: Tensor, added: int) -> Tensor:
    """
    Whether `A'` has as many eigenvalues at or above `τ²` as A, from grams `(..., r, r)` at the shift `-τ²`.

    Sylvester's law of inertia on `[[A - τ², Wᵀ], [W, -C]]`, whose two Schur complements are `A' - τ²` and `-(C + M)`.
    """
    signs = torch.ones(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    signs[added:] = -1
    positive = (torch.linalg.eigvalsh(grams + torch.diag(signs)) > 0).sum(-1)
    return positive <= added
