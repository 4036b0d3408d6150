# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Precision, recall, density and coverage of a generated set, block by block and without rounding's say.

With `r_i` the distance of the real row i to its k-th nearest other real row, `s_j` that of the generated row j among
the generated ones, and `d_ij` the distance between the two (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1-3; Naeem et
al., arXiv 2002.09797, Eq. 3-4):

    precision = mean_j [any_i d_ij < r_i]            recall   = mean_i [any_j d_ij < s_j]
    density   = mean_j Σ_i [d_ij < r_i] / k          coverage = mean_i [any_j d_ij < r_i]

What decides is the order of two distances. Nearly all comparisons are settled by float32 products with a bound of
their error that holds whatever the order of summation; the rest, a few pairs a row, are computed again from the
differences in float64. Where float32 settles too little (many rows in a far heap), products are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_shape_and_values
from .precision import full_precision, mean_of_rows

BLOCK = 2_048  # rows of a block of distances, 16 MiB in float32
SPARE = 8  # neighbours kept beyond the k-th, among which rounding may have confused it
PAIR_NUMBERS = 2**21  # float64 numbers of a chunk of pairs
TINY = 1e-30  # covers float32's underflow, where the largest coordinate is 1


@dataclass(frozen=True)
class _Points:
    """Rows about a centre, in units of a power of two that rounds nothing."""

    rows: Tensor  # (N, d), any float dtype
    centre: Tensor  # (d,) float64, of float32's numbers
    scale: float
    squares: Tensor  # (N,) float64, |row|²

    @classmethod
    def about(cls, rows: Tensor, centre: Tensor, scale: float) -> "_Points":
        centre = centre.float().double()
        squares = [((part.double() - centre) / scale).square().sum(dim=1) for part in rows.split(BLOCK)]
        return cls(rows, centre, scale, torch.cat(squares))

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Centred rows; one rounding in `dtype`, or in the rows' own where that is wider."""
        rows = self.rows[which]
        rows = rows.to(torch.promote_types(rows.dtype, dtype))
        return (rows - self.centre.to(rows.dtype)).mul_(1 / self.scale).to(dtype)

    def error(self, dtype: torch.dtype) -> Tensor:
        """(N,): the error of a squared distance is at most the sum of two rows'.

        `|fl(x·y) - x·y| ≤ γ |x| |y|` with `γ = n u / (1 - n u)` in any order of summation (Higham, Accuracy and
        Stability of Numerical Algorithms, Sec. 3.1), and `2 |x| |y| ≤ |x|² + |y|²`. n is d and a few roundings more.
        """
        rounding = (self.rows.shape[1] + 32) * torch.finfo(dtype).eps / 2
        return rounding / (1 - rounding) * self.squares + TINY


def _lower_bounds(x: _Points, rows: slice | Tensor, y: _Points, columns: slice, dtype: torch.dtype) -> Tensor:
    """Lower bounds (P, Q) of squared distances; the true one is at most twice the two rows' `error` above."""
    of_rows = (x.squares - x.error(dtype))[rows].to(dtype)
    of_columns = (y.squares - y.error(dtype))[columns].to(dtype)
    with full_precision():
        bounds = torch.addmm(of_columns, x.block(rows, dtype), y.block(columns, dtype).T, alpha=-2)
    return bounds.add_(of_rows[:, None])


def _squared_distances(x: _Points, rows: Tensor, y: _Points, columns: Tensor) -> Tensor:
    """Of the pairs (rows[p], columns[p]), (P,) float64: exactly 0 for equal rows, the same both ways round."""
    size = max(1, PAIR_NUMBERS // x.rows.shape[1])
    parts = [
        (x.rows[i].double() - y.rows[j].double()).mul_(1 / x.scale).square_().sum(dim=1)
        for i, j in zip(rows.split(size), columns.split(size), strict=True)
    ]
    return torch.cat(parts)


# ---- radii of neighbourhoods ----


def _neighbour_distances(points: _Points, ks: set[int], bar: tqdm) -> dict[int, Tensor]:
    """Squared distances (N,) float64 of each row to its k-th nearest other row, for each k."""
    radii = {k: points.squares.new_empty(len(points)) for k in ks}
    remaining = torch.arange(len(points), device=points.rows.device)
    for dtype in (torch.float32, torch.float64):
        near = _Nearest(points, remaining, max(ks) + SPARE, dtype)
        if dtype == torch.float32:
            near.look_at_all_pairs(bar)
        else:
            near.look_at_all_columns()
        remaining = remaining[~near.settle(radii)]
        if not len(remaining):
            break
    for row in remaining:  # more equal distances than are kept
        others = torch.arange(len(points), device=row.device)
        others = others[others != row]
        distances = _squared_distances(points, row.expand_as(others), points, others)
        for k in ks:
            radii[k][row] = distances.kthvalue(k).values
    return radii


class _Nearest:
    """The rows with the least lower bounds of distance to each of `rows`, itself left out."""

    def __init__(self, points: _Points, rows: Tensor, keep: int, dtype: torch.dtype):
        self.points, self.rows, self.dtype = points, rows, dtype
        self.keep = min(keep, len(points) - 1)
        self.bounds = torch.full((len(rows), self.keep), math.inf, dtype=dtype, device=rows.device)
        self.neighbours = torch.zeros_like(self.bounds, dtype=torch.int64)

    def look_at_all_pairs(self, bar: tqdm) -> None:
        """Where `rows` are all rows: each block of pairs once, for its rows and for its columns."""
        blocks = list(_blocks(len(self.points)))
        for number, rows in enumerate(blocks):
            for columns in blocks[number:]:
                bounds = _lower_bounds(self.points, rows, self.points, columns, self.dtype)
                if rows == columns:
                    bounds.fill_diagonal_(math.inf)
                else:
                    self._keep(columns, bounds.T.contiguous(), rows.start)
                self._keep(rows, bounds, columns.start)
                bar.update()

    def look_at_all_columns(self) -> None:
        for part in _blocks(len(self.rows)):
            for columns in _blocks(len(self.points)):
                rows = self.rows[part]
                bounds = _lower_bounds(self.points, rows, self.points, columns, self.dtype)
                here = ((rows >= columns.start) & (rows < columns.stop)).nonzero().flatten()
                bounds[here, rows[here] - columns.start] = math.inf
                self._keep(part, bounds, columns.start)

    def _keep(self, part: slice, bounds: Tensor, first: int) -> None:
        bounds, columns = bounds.topk(min(self.keep, bounds.shape[1]), dim=1, largest=False, sorted=False)
        bounds = torch.cat([self.bounds[part], bounds], dim=1)
        columns = torch.cat([self.neighbours[part], columns + first], dim=1)
        self.bounds[part], chosen = bounds.topk(self.keep, dim=1, largest=False)
        self.neighbours[part] = columns.gather(1, chosen)

    def settle(self, radii: dict[int, Tensor]) -> Tensor:
        """Fills in radii; (R,) bool says of which rows, those whose k-th neighbour is surely among the kept ones."""
        settled = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        error = self.points.error(self.dtype)
        for part in _blocks(len(self.rows)):
            rows, neighbours = self.rows[part], self.neighbours[part]
            distances = self.bounds[part].double().clamp(min=0)
            upper = distances + 2 * (error[rows][:, None] + error[neighbours])
            beyond = distances[:, -1].clone() if self.keep < len(self.points) - 1 else torch.inf
            doubtful = torch.zeros_like(distances, dtype=torch.bool)
            for k in radii:
                # the k-th distance lies between the k-th lower and the k-th upper bound
                least, most = (bound.kthvalue(k, dim=1, keepdim=True).values for bound in (distances, upper))
                doubtful |= (upper >= least) & (distances <= most)
            # what is not doubtful for any k is on the same side of the k-th distance as its lower bound
            row, place = doubtful.nonzero(as_tuple=True)
            distances[row, place] = _squared_distances(self.points, rows[row], self.points, neighbours[row, place])
            ordered = distances.sort(dim=1).values
            for k, radius in radii.items():
                radius[rows] = ordered[:, k - 1]
                settled[part] &= ordered[:, k - 1] <= beyond
        return settled


# ---- who lies in whose neighbourhood ----


def _pairs_within(
    x: _Points, rows: slice, y: _Points, columns: slice, radii_x: Tensor, radii_y: Tensor, resolution: float
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Pairs of a block that may be closer than a radius of x's `(K, N)` or of y's `(L, M)`: rows (P,), columns (P,) and
    squared distances (P,), whose order to every radius is the true one, to a relative `resolution`.
    """
    most_x, most_y = radii_x[:, rows].amax(dim=0), radii_y[:, columns].amax(dim=0)
    for dtype in (torch.float32, torch.float64):
        bounds = _lower_bounds(x, rows, y, columns, dtype)
        margin = 1 + 4 * torch.finfo(dtype).eps  # radii may round down
        possible = bounds < (most_x * margin).to(dtype)[:, None]
        possible |= bounds < (most_y * margin).to(dtype)
        i, j = possible.nonzero(as_tuple=True)
        lower = bounds[i, j].double().clamp(min=0)
        i, j = i + rows.start, j + columns.start
        upper = lower + 2 * (x.error(dtype)[i] + y.error(dtype)[j])
        doubtful = torch.zeros_like(lower, dtype=torch.bool)
        for radius in (*radii_x[:, i], *radii_y[:, j]):
            doubtful |= (lower < radius * (1 + resolution)) & (upper >= radius * (1 - resolution))
        if doubtful.sum() <= bounds.numel() // 128:  # beyond, float64 products are cheaper than pairs apart
            break
    lower[doubtful] = _squared_distances(x, i[doubtful], y, j[doubtful])
    return i, j, lower


def _blocks(count: int) -> Iterator[slice]:
    """Slices of nearly equal length."""
    number = math.ceil(count / BLOCK)
    edges = [count * block // number for block in range(number + 1)]
    yield from map(slice, edges[:-1], edges[1:])


# ---- the door ----


@torch.no_grad()
def precision_recall_density_coverage(
    real: Tensor,
    generated: Tensor,
    nearest_k: int = 5,
    *,
    precision_recall_k: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """
    Precision and recall (Kynkäänniemi et al., arXiv 1904.06991); density and coverage (Naeem et al., arXiv
    2002.09797).

    A row's neighbourhood is the open ball that reaches to its k-th nearest *other* row of the same set: a row exactly
    as far as the k-th neighbour lies outside, and copies of a row are other rows. The original precision and recall
    count the border in (`≤`); the `prdc` package, whose numbers these are, does not.

    Distances are Euclidean. For float32 features they are compared after rounding to float32, as scikit-learn's, on
    which `prdc` rests, are; for any other dtype, and where the two sets' dtypes differ, in float64. The result
    depends neither on the order of rows nor on how the work is divided.

    Args:
        real (`torch.Tensor` of shape `(N, d)`), generated (`torch.Tensor` of shape `(M, d)`):
            features, any float dtype, on one device.
        nearest_k (`int`, *optional*, defaults to 5): k of density and coverage, and of the other two unless the next
            argument says otherwise.
        precision_recall_k (`int`, *optional*): k of precision and recall; the literature's tables have 3.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        `dict[str, float]`: `"precision"`, `"recall"`, `"density"`, `"coverage"`. Density may exceed 1.

    Raises:
        ValueError: wrong shapes, dimensions that differ, NaN or infinite values, or a set of k rows or fewer.
    """
    overlap_k = nearest_k if precision_recall_k is None else precision_recall_k
    check_shape_and_values(real, "real features")
    check_shape_and_values(generated, "generated features", real.shape[1])
    for name, k in (("nearest_k", nearest_k), ("precision_recall_k", overlap_k)):
        if int(k) != k or k < 1:
            raise ValueError(f"{name}={k} must be a whole number from 1.")
        for kind, features in (("real", real), ("generated", generated)):
            if len(features) <= k:
                raise ValueError(
                    f"{name}={k} needs at least {k + 1} {kind} rows, each with {k} others, but there are "
                    f"{len(features)}: give more images or a smaller {name}."
                )
    return _count(real, generated, int(nearest_k), int(overlap_k), progress)


def _count(real: Tensor, generated: Tensor, k: int, overlap_k: int, progress: bool) -> dict[str, float]:
    centres = [mean_of_rows(rows) for rows in (real, generated)]
    largest = max(
        (part.double() - centres[0]).abs().amax().item() for rows in (real, generated) for part in rows.split(BLOCK)
    )
    scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
    numbers = [len(list(_blocks(len(rows)))) for rows in (real, generated)]
    total = sum(number * (number + 1) // 2 for number in numbers) + numbers[0] * numbers[1]
    with tqdm(total=total, disable=not progress, unit="block", desc="precision, recall, density, coverage") as bar:
        within = _neighbour_distances(_Points.about(real, centres[0], scale), {k, overlap_k}, bar)
        radii_x = torch.stack([within[k], within[overlap_k]])
        radii_y = _neighbour_distances(_Points.about(generated, centres[1], scale), {overlap_k}, bar)[overlap_k][None]
        middle = (centres[0] + centres[1]) / 2
        x, y = _Points.about(real, middle, scale), _Points.about(generated, middle, scale)
        compared = torch.float32 if real.dtype == generated.dtype == torch.float32 else torch.float64
        resolution = 8 * torch.finfo(compared).eps
        precise, (recalled, covered) = _false(y), (_false(x), _false(x))
        dense = 0
        for rows in _blocks(len(x)):
            for columns in _blocks(len(y)):
                i, j, squared = _pairs_within(x, rows, y, columns, radii_x, radii_y, resolution)
                distances = _as_compared(squared, compared)
                inside, inside_x, inside_y = (
                    distances < _as_compared(radius, compared) for radius in (*radii_x[:, i], radii_y[0, j])
                )
                dense += int(inside.sum())
                covered[i[inside]] = True
                precise[j[inside_x]] = True
                recalled[i[inside_y]] = True
                bar.update()
    return {
        "precision": precise.sum().item() / len(y),
        "recall": recalled.sum().item() / len(x),
        "density": dense / (k * len(y)),
        "coverage": covered.sum().item() / len(x),
    }


def _as_compared(squares: Tensor, compared: torch.dtype) -> Tensor:
    """Distances as scikit-learn rounds them; by way of float64, as torch's root of float32 may be a digit off."""
    return squares.float().double().sqrt().float() if compared == torch.float32 else squares


def _false(points: _Points) -> Tensor:
    return torch.zeros(len(points), dtype=torch.bool, device=points.rows.device)
