# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The Fréchet distance after some rows of a reference set are replaced: this library against the usual ways.

    OMP_NUM_THREADS=1 python benchmarks/reward.py            # every size, about an hour
    OMP_NUM_THREADS=1 python benchmarks/reward.py --dimensions 2048 --counts 5000 --sizes 50 --batches 16

Seconds and memory are per subset; the refresh is paid once per reference set. Slow methods are timed on a few subsets.
Errors are against float64 eigenvalues of the recomputed product: relative to the distance, and of differences between
subsets in units of their standard deviation, because advantages are made of differences. Features are synthetic: they
have classes, heavy tails and a spectrum as ill-conditioned as Inception's.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import scipy.linalg
import torch
from results import Row, markdown, rounded, write_table
from torch import Tensor

from trl_distreward import FeatureStatistics, FrechetDistance
from trl_distreward.metrics.frechet import RealRoot

NUM_EXACT = 8  # subsets whose exact distance is computed
NUM_SLOW = 2  # subsets on which slow methods are timed
METHODS = ("sqrtm", "eigvals", "eigvalsh", "direct", "logdet")
COLUMNS = ("d", "N", "n", "B", "method", "seconds", "times_ours", "refresh_seconds", "leave_one_in_seconds")
COLUMNS += ("peak_mib", "relative_error", "difference_error")


def make_features(count: int, dimension: int, seed: int, generated: bool, condition: float = 1.7e5) -> Tensor:
    """
    Makes class-structured, heavy-tailed float32 features `(count, dimension)`; generated ones differ a little.

    Each row is a class mean plus Student-t noise with 8 degrees of freedom, in an orthogonal basis in which variances
    fall from 1 to 1 / condition as a power law.
    """
    basis = torch.Generator().manual_seed(dimension)
    draw = torch.Generator().manual_seed(seed)
    power = math.log(condition) / math.log(dimension) / 2
    scale = torch.arange(1, dimension + 1).float() ** -power
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=basis)).Q
    classes = torch.randn(100, dimension, generator=basis) * scale * 0.7
    bent = torch.randn(dimension, dimension, generator=basis) * 0.03 / dimension**0.5
    if generated:
        scale = scale * (1 + 0.1 * torch.randn(dimension, generator=basis))
    features = torch.empty(count, dimension)
    for rows in features.split(8192):
        chi = torch.randn(len(rows), 8, generator=draw).square().mean(1, keepdim=True).sqrt()
        noise = torch.randn(len(rows), dimension, generator=draw) / chi
        values = classes[torch.randint(0, 100, (len(rows),), generator=draw)] + noise * scale
        if generated:
            values = values + values @ bent * scale + 0.02 * scale
        rows.copy_(values @ rotation)
    return features * 20 + 1


@cache
def real_statistics(dimension: int, count: int) -> FeatureStatistics:
    statistics = FeatureStatistics(dimension)
    for part in make_features(count, dimension, 0, generated=False).split(8192):
        statistics.update(part)
    return statistics


class Baselines:
    """The distance of one changed set, recomputed."""

    def __init__(self, real: FeatureStatistics, features: Tensor):
        self.features = features
        self.mean, self.covariance = real.mean.to(features.device), real.covariance.to(features.device)
        self.root = RealRoot.of(real).root.to(features.device)

    def __call__(self, method: str, index: Tensor, new: Tensor) -> float:
        changed = self.features.clone()
        changed[index] = new.to(changed)
        changed = changed.double()
        mean = changed.mean(0)
        changed -= mean
        covariance = changed.T @ changed / (len(changed) - 1)
        rest = (mean - self.mean).square().sum() + covariance.trace() + self.covariance.trace()
        return rest.item() - 2 * getattr(self, method)(covariance)

    def sqrtm(self, covariance: Tensor) -> float:
        root = scipy.linalg.sqrtm((covariance @ self.covariance).cpu().numpy())
        return float(np.trace(root).real)

    def eigvals(self, covariance: Tensor) -> float:
        return torch.linalg.eigvals(covariance @ self.covariance).sqrt().real.sum().item()

    def eigvalsh(self, covariance: Tensor) -> float:
        product = self.root @ covariance @ self.root
        spectrum = torch.linalg.eigvalsh((product + product.T) / 2)
        # eigenvalues beyond the rank of N rows are rounding noise
        zeros = max(0, len(spectrum) - len(self.features) + 1)
        return spectrum[zeros:].clamp(min=0).sqrt().sum().item()


def seconds_and_peak(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Returns the result, seconds, and MiB of memory beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    peak, done = [0], Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident() - held)

    thread = Thread(target=watch, daemon=True)
    if device.type != "cuda":
        thread.start()
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - held
    seconds = time.perf_counter() - started
    done.set()
    return result, seconds, peak[0] / 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(dimension: int, count: int, size: int, batch: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one size, a method each."""
    device = torch.device(args.device)
    real = real_statistics(dimension, args.real)
    features = make_features(count, dimension, 1, generated=True).to(device)
    new = make_features(batch * size, dimension, 2, generated=True).view(batch, size, dimension).to(device)
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(batch)]).to(device)
    baselines = Baselines(real, features)
    known = [baselines("eigvalsh", indices[b], new[b]) for b in range(min(NUM_EXACT, batch))]
    exact = torch.tensor(known, dtype=torch.float64)
    rows: list[Row] = []
    for method in METHODS:
        row: Row = {"d": dimension, "N": count, "n": size, "B": batch, "method": method}
        few = {"sqrtm": 1, "logdet": batch}.get(method, min(NUM_SLOW, batch))
        if method in ("direct", "logdet"):
            distance = FrechetDistance(real, method=method)
            _, row["refresh_seconds"], _ = seconds_and_peak(
                lambda d=distance: d.fit(features).replaced(indices[:1], new[:1]), device
            )  # with the eigendecomposition
            values, seconds, row["peak_mib"] = seconds_and_peak(
                lambda d=distance, k=few: d.replaced(indices[:k], new[:k]), device
            )
            if method == "logdet":
                _, credit, _ = seconds_and_peak(lambda d=distance: d.leave_one_in(indices, new), device)
                row["leave_one_in_seconds"] = credit / batch
        else:
            values, seconds, row["peak_mib"] = seconds_and_peak(
                lambda m=method, k=few: [baselines(m, indices[b], new[b]) for b in range(k)], device
            )
        values = torch.as_tensor(values, dtype=torch.float64).cpu()[: len(exact)]
        error = values - exact[: len(values)]
        row |= {"seconds": seconds / few, "relative_error": (error.abs() / exact[: len(values)]).max().item()}
        if len(values) > 2:
            row["difference_error"] = ((error.max() - error.min()) / exact.std()).item()
        rows.append(row)
    return [row | {"times_ours": row["seconds"] / rows[-1]["seconds"]} for row in rows]  # ours is the last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 768, 1024, 2048])
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 50000], help="sizes N of the reference set")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 50], help="numbers n of replaced rows")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128], help="numbers B of subsets")
    parser.add_argument("--real", type=int, default=20000, help="real images in the statistics")
    parser.add_argument("--per-image", type=int, default=6400, help="images that are rewarded one by one; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    sizes = [(n, b) for n in args.sizes for b in args.batches] + ([(1, args.per_image)] if args.per_image else [])
    rows: list[Row] = []
    for d in args.dimensions:
        for count in args.counts:
            for n, b in sizes:
                found = [rounded(row, 4) for row in measure(d, count, n, b, args)]
                rows += [{name: row[name] for name in COLUMNS if name in row} for row in found]
                print(markdown(list(COLUMNS), [[str(row.get(name, "")) for name in COLUMNS] for row in found]))
                write_table(args.output, rows, ("torch", "scipy"), device=args.device, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
