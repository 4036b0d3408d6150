# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance between Gaussians, and its exact value after replacing rows of a set.

With mean `m`, covariance `S` of the generated features and `m_r`, `S_r` of the real ones (Dowson and Landau, 1982):

    FD = |m - m_r|² + Tr S + Tr S_r - 2 Tr (S_r^½ S S_r^½)^½
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_features, check_fitted, check_replacement
from .frechet_eigenvalues import FittedSet, clean, symmetric, symmetric_sqrt
from .logdet import Factors, ShiftedGrams, eigenvalues_above, factorize, whitened_resolvents
from .precision import full_precision
from .quadrature import Quadrature, elliptic_quadrature
from .statistics import FeatureStatistics


def frechet_distance(generated: FeatureStatistics, real: FeatureStatistics, real_root: Tensor | None = None) -> float:
    """
    Fréchet distance between two sets of features (FID when they are Inception-v3's; Heusel et al., arXiv 1706.08500).

    Args:
        generated, real ([`FeatureStatistics`]): of the same dimension; the distance is symmetric in them.
        real_root (`torch.Tensor` of shape `(d, d)`, *optional*): `symmetric_sqrt(real.covariance, real.rank_bound)`,
            where several sets are compared with one: it is half of the work.

    Returns:
        `float`: the distance, computed in float64.

    Raises:
        ValueError: the dimensions differ, or a set has fewer than 2 vectors.
    """
    if generated.dimension != real.dimension:
        raise ValueError(
            f"the statistics have dimensions {generated.dimension} and {real.dimension}: they come from different "
            "extractors and cannot be compared."
        )
    covariance, real_covariance = generated.covariance, real.covariance.to(generated.mean.device)
    root = symmetric_sqrt(real_covariance, real.rank_bound) if real_root is None else real_root.to(covariance.device)
    rank = min(generated.rank_bound, real.rank_bound)
    spectrum = clean(torch.linalg.eigvalsh(symmetric(root @ covariance @ root)), rank)
    mean_term = (generated.mean - real.mean.to(generated.mean.device)).square().sum()
    distance = mean_term + covariance.trace() + real_covariance.trace() - 2 * spectrum.sqrt().sum()
    return max(distance.item(), 0.0)


# Square roots of eigenvalues are known to this part of the largest: that of float64's resolution.
ROUNDING = 1e-8


class _Basis(NamedTuple):
    """Eigenbasis of `A = R S R`, computed once per reference set."""

    eigenvalues: Tensor  # (d,), ascending, float64
    projection: Tensor  # P = Λ^-½ QᵀR, (d, d), rows of the eigenvalue 0 undivided: features to the whitened basis
    rows: Tensor  # Y = Z Pᵀ, (N, d): the reference rows in it

    @property
    def smallest(self) -> float:
        """Square root of the smallest eigenvalue that is not 0."""
        positive = self.eigenvalues[self.eigenvalues > 0]
        return positive[0].sqrt().item() if len(positive) else 0.0


class _Change(NamedTuple):
    """What replacing the rows of each of B subsets does."""

    result: Tensor  # distances (B,), or leave-one-in credits (B, n)
    distance: Tensor  # (B,)
    movement: Tensor  # (B,): rise and fall of the distance on the way, to which its errors are relative
    bound: Tensor  # (B,): of the quadrature's error on the distance
    failed: Tensor  # (B,), bool: not to be trusted


class FrechetDistance:
    """
    Fréchet distance of a reference set from real data, and its exact values after some of its rows are replaced.

    Replacing n rows changes `A = S_r^½ S S_r^½` by a term of rank 2n + 1. The change of `Tr A^½` then is an integral
    of log-determinants of that size (`quadrature.elliptic_quadrature`), with one eigendecomposition per reference
    set in place of one per subset. Moments, eigendecomposition and determinants are float64; projections and Gram
    products too, unless `dtype` says float32.

    Args:
        real ([`FeatureStatistics`]): of the real data.
        method (`str`, *optional*, defaults to `"auto"`): `"logdet"`, `"direct"` (the eigenvalues of every changed
            product, O(d³) a subset), or `"auto"`: direct where features are at most 64 wide or the change's rank is
            above a third of that width, logdet elsewhere.
        num_nodes (`int`, *optional*): quadrature nodes, a multiple of 3. By default as many as the a-priori bound
            needs for `tolerance`; 24 to 30 are typical.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`): of projections and Gram products. float32
            takes half the memory and about 2/3 of the time on CPU (less on GPUs that are slow in float64), and errs
            by about 1e-5 of the standard deviation between subsets, where float64 errs by 1e-6. Rank-deficient sets
            take float64 always.

    Attributes:
        value (`float`): the distance of the fitted reference set.
        features (`torch.Tensor` of shape `(N, d)`): the reference rows about their mean; `None` before `fit`.
        error_bound (`float`): a-priori bound of the quadrature's error, the worst of the last `replaced` or
            `leave_one_in`; 0 where no quadrature was needed.

    Example:

    ```python
    >>> distance = FrechetDistance(FeatureStatistics.from_features(real)).fit(generated)  # (N, d)
    >>> distance.replaced(indices, new_features)  # (B, n), (B, n, d) -> (B,)
    ```
    """

    # Bytes of work space for a batch of subsets; larger batches are cut into chunks.
    memory_budget = 2**28
    # Bound of the quadrature's error relative to the rise and fall of Tr A^½: chooses the number of nodes.
    tolerance = 1e-7
    # Relative error at which the check of one subset per reference set gives the method up: rounding stays below it.
    check_tolerance = 1e-5
    # Widest features whose check by eigenvalues is affordable (about 1 s at 2048).
    check_dimension = 2048

    def __init__(
        self,
        real: FeatureStatistics,
        method: str = "auto",
        num_nodes: int | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        if method not in ("auto", "logdet", "direct"):
            raise ValueError(f"method={method!r} is unknown: choose 'auto', 'logdet' or 'direct'.")
        if num_nodes is not None and (num_nodes < 3 or num_nodes % 3):
            raise ValueError(
                f"num_nodes={num_nodes} must be a multiple of 3, from which every third is a coarser rule."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype}: choose torch.float64 or torch.float32; narrower products are too coarse."
            )
        self.real, self.method, self.num_nodes, self.dtype = real, method, num_nodes, dtype
        values, vectors = torch.linalg.eigh(real.covariance)
        values = clean(values, real.rank_bound)
        self._root = (vectors * values.sqrt()) @ vectors.mT  # R = S_r^½
        self._real_largest = values[-1].item()
        self.features: Tensor | None = None
        self.error_bound = 0.0

    @property
    def dimension(self) -> int:
        return self.real.dimension

    def fit(self, features: Tensor) -> "FrechetDistance":
        """
        Sets the reference set. Moments always come from `features`, so that nothing drifts over many updates.

        Args:
            features (`torch.Tensor` of shape `(N, d)`): any float dtype; moments are computed in float64.

        Raises:
            ValueError: wrong shape or dimension, fewer than 2 rows, NaN or infinite values.
        """
        features = check_features(features, "reference features", self.dimension)
        if len(features) < 2:
            raise ValueError(f"the reference set has {len(features)} row: a covariance needs at least 2.")
        self._root = self._root.to(features.device)
        self._set = FittedSet.of(features, self.real, self._root, self.dtype)
        self.features = self._set.rows
        self._basis: _Basis | None = None
        self._value: float | None = None
        self._quadratures: dict[tuple[int, bool], tuple[Quadrature, ShiftedGrams]] = {}
        self._checked = self._gave_up = False
        return self

    @property
    def value(self) -> float:
        if self.features is None:
            raise ValueError("value needs a reference set: call fit(features) first.")
        if self._value is None:
            own = self._set
            roots = own.root_trace(own.product) if self._basis is None else self._basis.eigenvalues.sqrt().sum()
            self._value = own.distance(own.offset, own.trace, roots).item()
        return self._value

    def replaced(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Distances of the reference set after replacing its rows `indices[b]` by `features[b]`, for each subset b apart.

        The first call after `fit` compares one subset with its eigenvalues. Where quadrature and eigenvalues disagree,
        a warning says by how much and the eigenvalues are used until the next `fit`.

        Args:
            indices (`torch.LongTensor` of shape `(B, n)`): distinct rows within each subset, from 0 to N - 1.
            features (`torch.Tensor` of shape `(B, n, d)`): the new rows.

        Returns:
            `torch.Tensor` of shape `(B,)`, float64: exact distances, on the reference set's device.

        Raises:
            ValueError: before `fit`, on wrong shapes, repeated or out-of-range rows, NaN or infinite features.
        """
        return self._changed(indices, features, "replaced", leave_one_in=False)

    def leave_one_in(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Credit of each new row inside its subset: `D(G'_b) - D(G'_b without row j)`, exactly.

        `G'_b` is the set after the replacement; without row j it has N - 1 rows. A row that adds to what the others of
        its subset already supply earns nothing by it, which makes this the credit to train on.

        Args:
            indices, features: as in [`~FrechetDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n)`, float64; negative for a row that brings the set nearer to the real data.

        Raises:
            ValueError: as in [`~FrechetDistance.replaced`], or the reference set has fewer than 3 rows.
        """
        return self._changed(indices, features, "leave_one_in", leave_one_in=True)

    @torch.no_grad()
    def gradient(self, indices: Tensor, features: Tensor) -> Tensor:
        """
        Gradient of [`~FrechetDistance.replaced`] with respect to the new rows, each subset apart; for rewards that are
        back-propagated.

        With `G = I - R A'^-½ R`, `A' = R S' R`, row x of the updated set has the gradient

            2/(N - 1) · G (x - m') + 2/N · (m' - m_r)

        from `d Tr A^½ = ½ Tr(A^-½ dA)`; the mean's part of `dS'` cancels as rows about their mean sum to 0. It costs
        one eigendecomposition per subset whatever `method` is, and nothing grows with n but products of `(n, d)`:
        `A'^-½` is a function of the whole matrix, so that repeated eigenvalues do no harm.

        `A'^-½` is the pseudo-inverse's: eigenvalues that are 0 by the rank of the sets (N ≤ d, few real rows) or up to
        rounding, `d · ε` of the largest, contribute nothing. Zeros that all sets of these sizes have cost no
        exactness: `Tr A'^½` is the nuclear norm of the rows times R, smooth while its rank is the greatest possible.
        Where the set itself has collapsed (copies of a row in a set of N ≤ d, a feature that no longer varies) the
        distance has a kink, falling at one rate either way out of the collapse; what is returned is the mean of the
        one-sided derivatives, in every direction.

        Args:
            indices, features: as in [`~FrechetDistance.replaced`].

        Returns:
            `torch.Tensor` of shape `(B, n, d)`, float64, on the reference set's device, without a graph.

        Raises:
            ValueError: as in [`~FrechetDistance.replaced`].
        """
        check_replacement(indices, features, self._require_rows("gradient", 2), self.dimension)
        indices, features = indices.to(self._set.device), features.to(self._set.device)
        chunk = max(1, self.memory_budget // (8 * self.dimension * (6 * self.dimension + 7 * indices.shape[1])))
        pieces = zip(indices.split(chunk), features.split(chunk), strict=True)
        return torch.cat([self._set.gradient(idx, new) for idx, new in pieces])

    def delete_one(self, indices: Tensor) -> Tensor:
        """
        `D(G without row i) - D(G)` for rows `indices` of shape `(M,)`, exactly; `(M,)`, float64.

        With `z = x - m`: `m' = m - z / (N - 1)`, `S' = (N - 1)/(N - 2) · [S - N/(N - 1)² · zzᵀ]`.

        Raises:
            ValueError: before `fit`, fewer than 3 rows, indices out of range.
        """
        count = self._require_rows("delete_one", 3)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < count):
            raise ValueError(f"indices of shape {tuple(indices.shape)} must be (M,), from 0 to {count - 1}.")
        rows, chunks = self._eigenbasis().rows, indices.to(self._set.device).split(4096)  # of what may be gigabytes
        assert self.features is not None
        return torch.cat([self._one_image(self.features[chunk], rows[chunk], -1) for chunk in chunks])

    def add_one(self, features: Tensor) -> Tensor:
        """
        `D(G ∪ {x}) - D(G)` for rows x of `features` of shape `(M, d)`, exactly; `(M,)`, float64.

        A diagnostic, not a reward: each row is judged against the reference set alone, so that within one refresh
        window a generator is paid again and again for copies of the same image. Train on
        [`~FrechetDistance.leave_one_in`].

        With `z = x - m`: `m' = m + z / (N + 1)`, `S' = (N - 1)/N · [S + N/((N + 1)(N - 1)) · zzᵀ]`.

        Raises:
            ValueError: before `fit`, wrong shape or dimension, NaN or infinite values.
        """
        self._require_rows("add_one", 2)
        features = check_features(features, "new features", self.dimension).to(self._set.device) - self._set.mean
        projection = self._eigenbasis().projection
        with full_precision():
            return self._one_image(features, features.to(self._set.rows.dtype) @ projection.mT, 1)

    def _require_rows(self, name: str, least: int) -> int:
        count = len(check_fitted(self.features, name))
        if count < least:
            raise ValueError(f"{name}() on a reference set of {count} rows: it needs at least {least}.")
        return count

    def _one_image(self, centred: Tensor, projected: Tensor, sign: int) -> Tensor:
        """Change of the distance for rows z and y = Pz `(M, d)`, each added (`sign` 1) or removed (-1) alone."""
        count = self._set.count
        other = count + sign
        ratio = count / (other * (count - 1))  # c: A' = growth · (A + sign · c · yyᵀ)
        growth = (count - 1) / (other - 1)
        eigenvalues = self._eigenbasis().eigenvalues
        squares = centred.double().square().sum(1)
        if not len(squares):
            return squares
        # One row may fill or empty a direction: rules down to rounding, affordable as a node costs one column here.
        # A removed row raises nothing.
        rise = squares.max().item() * self._real_largest * ratio if sign > 0 else 0.0
        rule, _ = self._quadrature(rise, full_range=True)
        scales = whitened_resolvents(eigenvalues, rule.nodes.to(eigenvalues.device) ** 2)
        forms = torch.cat([part.double().square() @ scales.T for part in projected.split(4096)])  # (M, J)
        logs = torch.log1p((sign * ratio * forms).clamp(min=-1 + 1e-15))
        roots = eigenvalues.sqrt().sum()
        new_roots = growth**0.5 * (roots + logs @ rule.weights.to(logs.device))
        mean_term = 2 * sign * (centred.double() @ self._set.offset) / other + squares / other**2
        return mean_term + (growth - 1) * self._set.trace + growth * sign * ratio * squares - 2 * (new_roots - roots)

    def _changed(self, indices: Tensor, features: Tensor, name: str, leave_one_in: bool) -> Tensor:
        count = self._require_rows(name, 3 if leave_one_in else 2)
        check_replacement(indices, features, count, self.dimension)
        indices, features = indices.to(self._set.device), features.to(self._set.device)
        self.error_bound = 0.0
        if not self._uses_logdet(indices.shape[1], leave_one_in):
            return self._direct(indices, features, leave_one_in)
        size = indices.shape[1]
        rise = max(self._rise(part) for part in features.split(max(1, 2**20 // (size * self.dimension))))
        rule, grams = self._quadrature(rise)
        chunk = max(1, self.memory_budget // grams.bytes_per_subset(2 * size + 1))
        results = []
        for idx, new in zip(indices.split(chunk), features.split(chunk), strict=True):
            change = self._change(idx, new, rule, grams, leave_one_in)
            if not self._checked:
                self._check(idx, new, change)
            if self._gave_up:
                self.error_bound = 0.0
                return self._direct(indices, features, leave_one_in)
            self.error_bound = max(self.error_bound, change.bound.max().item())
            failed = change.failed.nonzero().flatten()
            if len(failed):
                change.result[failed] = self._direct(idx[failed], new[failed], leave_one_in)
            results.append(change.result)
        return torch.cat(results)

    def _uses_logdet(self, size: int, leave_one_in: bool) -> bool:
        if self._gave_up or self.method == "direct":
            return False
        narrow = self.dimension <= 64 or 3 * (2 * size + 1) > self.dimension
        return self.method == "logdet" or leave_one_in or not narrow

    def _rise(self, features: Tensor) -> float:
        """The most by which rows added, of `features` `(B, n, d)`, can raise an eigenvalue of A."""
        squares = (features.double() - self._set.mean).square().sum((1, 2)).max().item()
        return squares * self._real_largest / (self._set.count - 1)

    def _eigenbasis(self) -> _Basis:
        if self._basis is None:
            eigenvalues, vectors = torch.linalg.eigh(self._set.product)
            eigenvalues = clean(eigenvalues, self._set.rank)
            projection = vectors.mT @ self._root / torch.where(eigenvalues > 0, eigenvalues, 1.0).sqrt()[:, None]
            projection = projection.to(self._set.rows.dtype)
            with full_precision():
                rows = self.features @ projection.mT
            self._basis = _Basis(eigenvalues, projection, rows)
        return self._basis

    def _quadrature(self, rise: float, full_range: bool = False) -> tuple[Quadrature, ShiftedGrams]:
        """
        The rule for changes that raise no eigenvalue of A by more than `rise`, with grams at `-lower²` and its nodes.

        The upper end grows in octaves, so that rules are reused and a subset's value does not hang on its neighbours.
        Below, half of the smallest root leaves room for removed rows; `full_range` goes down to rounding.
        """
        eigenvalues = self._eigenbasis().eigenvalues
        largest = eigenvalues[-1].item() or 1e-30
        octaves = math.ceil(math.log2(1 + rise / largest))
        key = (octaves, full_range)
        if key not in self._quadratures:
            upper = (largest * 2**octaves) ** 0.5
            floor = ROUNDING * upper
            lower = floor if full_range else max(self._eigenbasis().smallest / 2, floor)
            rule = elliptic_quadrature(lower, upper, self.tolerance, None if full_range else self.num_nodes)
            shifts = torch.cat([rule.nodes.new_tensor([-lower]), rule.nodes]).to(eigenvalues.device)
            self._quadratures[key] = rule, ShiftedGrams(eigenvalues, shifts * shifts.abs(), self._set.rows.dtype)
        return self._quadratures[key]

    def _change(
        self, indices: Tensor, features: Tensor, rule: Quadrature, shifted: ShiftedGrams, leave_one_in: bool
    ) -> _Change:
        count, size, basis = self._set.count, indices.shape[1], self._eigenbasis()
        added, removed = features.double() - self._set.mean, self.features[indices]  # type: ignore[index]  # (B, n, d)
        shift = (added.sum(1) - removed.sum(1, dtype=torch.float64)) / count  # new mean minus old, (B, d)
        squares = added.square().sum((1, 2)) - removed.double().square().sum((1, 2)) - count * shift.square().sum(1)
        trace = self._set.trace + squares / (count - 1)
        mean = self._set.mean + shift - self._set.real_mean

        # A' - A = W₊ᵀW₊ - W₋ᵀW₋ in the eigenbasis, with the shift of the mean as the last row of W₋
        with full_precision():
            y_added, y_removed = added.to(self._set.rows.dtype) @ basis.projection.mT, basis.rows[indices]
            y_shift = (y_added.sum(1, dtype=torch.float64) - y_removed.sum(1, dtype=torch.float64)) / count**0.5
            rows = (
                torch.cat([y_added, y_removed, y_shift[:, None].to(self._set.rows.dtype)], dim=1) / (count - 1) ** 0.5
            )
            grams = shifted(rows)  # (1 + J, B, 2n + 1, 2n + 1), J the number of nodes
        factors = factorize(grams[1:], size)
        weights, coarse = rule.weights.to(rows.device), rule.coarse.to(rows.device)
        rise, fall = weights @ factors.rise, weights @ factors.fall
        root_trace = basis.eigenvalues.sqrt().sum() + rise - fall
        distance = self._set.distance(mean, trace, root_trace)

        # Trusted where the bound's premises hold: no eigenvalue fell out of the rule's interval, and the rule of every
        # third node is as near as its own bound says.
        movement = rise + fall
        difference = (rise - fall - coarse @ (factors.rise - factors.fall)).abs()
        trusted = (
            difference <= (rule.bound + rule.coarse_bound + self.check_tolerance) * movement + 1e-12 * self._set.trace
        )
        if rule.lower > ROUNDING * rule.upper:
            trusted &= eigenvalues_above(grams[0], size)
        failed = factors.failed.any(0) | ~trusted
        result = distance
        if leave_one_in:
            result = self._credits(added - shift[:, None], mean, trace, root_trace, factors, rule)
        return _Change(result, distance, 2 * movement, 2 * rule.bound * movement, failed)

    def _credits(
        self, rows: Tensor, mean: Tensor, trace: Tensor, root_trace: Tensor, factors: Factors, rule: Quadrature
    ) -> Tensor:
        """
        `D(G') - D(G' without row j)` for new rows about the new mean, z' of shape `(B, n, d)`.

        With `c = N/(N - 1)²` the change of `Tr A'^½` needs `1 - c y'ᵀ(A' + s²)⁻¹y'`. By Woodbury this is
        `c · uᵀ(C + M)⁻¹u` with `u = √(N - 1) (e_j + e_shift/√N)`: the 1 cancels on paper, not in floating point.
        """
        count, size = self._set.count, rows.shape[1]
        ratio, growth = count / (count - 1) ** 2, (count - 1) / (count - 2)
        unit = torch.eye(size, dtype=torch.float64, device=rows.device) * (count - 1) ** 0.5
        tail = unit.new_zeros(size + 1, size)
        tail[-1] = ((count - 1) / count) ** 0.5
        shape = factors.failed.shape
        forms = factors.inverse_forms(unit.expand(*shape, size, size), tail.expand(*shape, size + 1, size))
        logs = (ratio * forms).clamp(min=1e-30).log()  # (J, B, n)
        weights, nodes = rule.weights.to(logs.device), rule.nodes.to(logs.device)[:, None, None]
        emptied = 0.0
        if self._set.rank_of(count - 1) < self._set.rank_of(count):
            # one eigenvalue becomes exactly 0, below any interval: let it end inside, and take the rest analytically
            emptied = 2 * rule.lower
            logs = logs - (nodes**2 / (emptied**2 + nodes**2)).log()
        fallen = torch.tensordot(weights, logs, 1) - emptied
        squares = rows.square().sum(2)  # (B, n)
        mean_term = squares / (count - 1) ** 2 - 2 * (rows @ mean[:, :, None])[..., 0] / (count - 1)
        trace_term = (growth - 1) * trace[:, None] - growth * ratio * squares
        root_term = (growth**0.5 - 1) * root_trace[:, None] + growth**0.5 * fallen
        return 2 * root_term - mean_term - trace_term

    def _check(self, indices: Tensor, features: Tensor, change: _Change) -> None:
        """Compares one subset with its eigenvalues; gives the method up for this reference set where they differ."""
        trusted = (~change.failed).nonzero().flatten()
        if len(trusted) == 0:
            return
        self._checked = True
        if self.dimension > self.check_dimension:
            return
        sample = trusted[:1]
        error = (change.distance[sample] - self._direct(indices[sample], features[sample])).abs().item()
        allowed = self.check_tolerance * change.movement[sample].item() + 1e-9 * self._set.trace.item()
        if not error <= allowed:
            self._gave_up = True
            warnings.warn(
                f"the log-determinant quadrature is off by {error:.1e} on a sampled subset, above {allowed:.1e} "
                f"(a-priori bound {change.bound[sample].item():.1e}): eigenvalues are used until the next fit(), "
                "which is exact but takes O(d³) a subset. Leave num_nodes=None and dtype=torch.float64.",
                stacklevel=4,
            )

    def _direct(self, indices: Tensor, features: Tensor, leave_one_in: bool = False) -> Tensor:
        """The same from the eigenvalues of each changed product."""
        chunk = max(1, self.memory_budget // (8 * self.dimension * (3 * self.dimension + 4 * indices.shape[1])))
        pieces = zip(indices.split(chunk), features.split(chunk), strict=True)
        return torch.cat([self._set.direct(idx, new, leave_one_in) for idx, new in pieces])
