# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Precision, recall, density and coverage of a generated set, in blocks.

With `r_i` the distance of the real row i to its k-th nearest other real row, `s_j` that of the generated row j among
the generated ones, and `d_ij` the distance between the two (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1-3; Naeem et
al., arXiv 2002.09797, Eq. 3-4):

    precision = mean_j [any_i d_ij < r_i]            recall   = mean_i [any_j d_ij < s_j]
    density   = mean_j Σ_i [d_ij < r_i] / k          coverage = mean_i [any_j d_ij < r_i]
"""

import torch
from torch import Tensor

from .checks import check_features

BLOCK = 2_048  # rows and columns of a block of distances, 32 MiB in float64


@torch.no_grad()
def precision_recall_density_coverage(
    real: Tensor, generated: Tensor, nearest_k: int = 5, *, precision_recall_k: int | None = None
) -> dict[str, float]:
    """
    Precision, recall, density and coverage of a generated set `(M, d)` among real rows `(N, d)`, on one device.

    A row's neighbourhood is the open ball that reaches to its k-th nearest *other* row of the same set; copies of a
    row are other rows. k is `nearest_k`; for precision and recall `precision_recall_k`, often 3, if it is given.
    Distances are float64; between float32 features they are compared after rounding to float32. Both are as in the
    `prdc` package. (The original precision and recall count the border in, `≤`.)
    """
    overlap_k = nearest_k if precision_recall_k is None else precision_recall_k
    check_features(real, "real features")
    check_features(generated, "generated features", real.shape[1])
    most = min(len(real), len(generated)) - 1
    if not 1 <= min(nearest_k, overlap_k) <= max(nearest_k, overlap_k) <= most:
        ks = f"nearest_k={nearest_k} and precision_recall_k={overlap_k}"
        raise ValueError(f"{ks} must lie in 1 to {most}, below the number of rows: give more images or a smaller k.")
    compared = torch.float32 if real.dtype == generated.dtype == torch.float32 else torch.float64
    centre = real[:BLOCK].double().median(dim=0).values  # products of rows about it lose fewer digits
    radii, overlap_radii = _radii(real, centre, (nearest_k, overlap_k), compared)
    (generated_radii,) = _radii(generated, centre, (overlap_k,), compared)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled, precise = covered.clone(), covered.new_zeros(len(generated))
    dense = 0
    for i in range(0, len(real), BLOCK):
        for j in range(0, len(generated), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            distances = _distances(real[rows], generated[columns], centre, compared)
            inside = distances < radii[rows, None]
            dense += int(inside.sum())
            covered[rows] |= inside.any(dim=1)
            precise[columns] |= (distances < overlap_radii[rows, None]).any(dim=0)
            recalled[rows] |= (distances < generated_radii[columns]).any(dim=1)
    return {
        "precision": precise.sum().item() / len(generated),
        "recall": recalled.sum().item() / len(real),
        "density": dense / (nearest_k * len(generated)),
        "coverage": covered.sum().item() / len(real),
    }


def _radii(features: Tensor, centre: Tensor, ks: tuple[int, ...], compared: torch.dtype) -> list[Tensor]:
    """Distances `(N,)` of each row to its k-th nearest other row, for each k."""
    most = max(ks)
    nearest = torch.full((len(features), most), torch.inf, dtype=compared, device=features.device)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(features), BLOCK)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            distances = _distances(features[rows], features[columns], centre, compared)
            if rows == columns:
                distances.fill_diagonal_(torch.inf)
            else:
                found = torch.cat([nearest[columns], distances.T], dim=1)
                nearest[columns] = found.topk(most, dim=1, largest=False).values
            nearest[rows] = torch.cat([nearest[rows], distances], dim=1).topk(most, dim=1, largest=False).values
    return [nearest[:, k - 1] for k in ks]


def _distances(x: Tensor, y: Tensor, centre: Tensor, compared: torch.dtype) -> Tensor:
    """Distances `(P, Q)`, 0 where they are below the rounding of float64 products: the rows are copies."""
    x, y = x.double() - centre, y.double() - centre
    copies = 1e-7 * (x.norm(dim=1)[:, None] + y.norm(dim=1))
    distances = torch.cdist(x, y)
    squares = distances.masked_fill_(distances < copies, 0).square_().to(compared)  # rounded first, as in scikit-learn
    return squares.double().sqrt_().to(compared)
