# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The Fréchet distance after replacing some rows of a reference set: ours against the ways in use.

    OMP_NUM_THREADS=1 python benchmarks/reward.py            # every size, about an hour
    OMP_NUM_THREADS=1 python benchmarks/reward.py --quick    # a minute
    OMP_NUM_THREADS=1 python benchmarks/reward.py --dimensions 2048 --counts 5000 --sizes 50 --batches 16

Seconds and memory are per subset, but for the refresh, which is paid once per reference set. The slow methods are
timed on a few subsets. Errors are against float64 eigenvalues of the recomputed product: relative to the distance, and
of differences between subsets in units of their standard deviation, which is what advantages are made of.
Features are synthetic: classes, heavy tails, and a spectrum as ill-conditioned as Inception's (see `make_features`).
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_distreward import FeatureStatistics, FrechetDistance
from trl_distreward.metrics.frechet import RealRoot


def make_features(count: int, dimension: int, seed: int, generated: bool, condition: float = 1.7e5) -> Tensor:
    """
    Class-structured, heavy-tailed float32 features `(count, dimension)`; generated ones differ a little.

    A class mean plus Student-t noise of 8 degrees of freedom, in an orthogonal basis where variances fall from 1 to
    1 / condition as a power law, and squashed to be positive as pooled ReLU features are.
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


def recompute(features: Tensor, index: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the changed set, as every method but the last two needs them."""
    changed = features.clone()
    changed[index] = new.to(changed)
    changed = changed.double()
    mean = changed.mean(0)
    changed -= mean
    return mean, changed.T @ changed / (len(changed) - 1)


class Baselines:
    """The distance of one changed set, recomputed."""

    def __init__(self, real: FeatureStatistics, features: Tensor):
        self.features = features
        self.mean, self.covariance = real.mean.to(features.device), real.covariance.to(features.device)
        self.root = RealRoot.of(real).root.to(features.device)

    def rest(self, mean: Tensor, covariance: Tensor) -> float:
        return ((mean - self.mean).square().sum() + covariance.trace() + self.covariance.trace()).item()

    def sqrtm(self, index: Tensor, new: Tensor) -> float:
        mean, covariance = recompute(self.features, index, new)
        root = scipy.linalg.sqrtm((covariance @ self.covariance).cpu().numpy())
        return self.rest(mean, covariance) - 2 * float(np.trace(root).real)

    def eigvals(self, index: Tensor, new: Tensor) -> float:
        mean, covariance = recompute(self.features, index, new)
        roots = torch.linalg.eigvals(covariance @ self.covariance).sqrt().real.sum()
        return self.rest(mean, covariance) - 2 * roots.item()

    def eigvalsh(self, index: Tensor, new: Tensor) -> float:
        mean, covariance = recompute(self.features, index, new)
        product = self.root @ covariance @ self.root
        spectrum = torch.linalg.eigvalsh((product + product.T) / 2)
        # as in the library: what the rank of N rows does not allow is rounding noise
        zeros = max(0, len(spectrum) - len(self.features) + 1)
        return self.rest(mean, covariance) - 2 * spectrum[zeros:].clamp(min=0).sqrt().sum().item()


def seconds_and_peak(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Result, seconds, and MiB of memory beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        return result, time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**20
    held, peak, done = resident(), [0], Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident() - held)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    return result, seconds, peak[0] / 2**20


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def measure(dimension: int, count: int, size: int, batch: int, device: torch.device, args) -> list[dict[str, Any]]:
    real = statistics_of(dimension, args.real)
    features = make_features(count, dimension, 1, generated=True).to(device)
    new = make_features(batch * size, dimension, 2, generated=True).view(batch, size, dimension).to(device)
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(batch)]).to(device)
    few = min(args.slow, batch)
    baselines = Baselines(real, features)
    rows: list[dict[str, Any]] = []
    exact = torch.tensor(
        [baselines.eigvalsh(indices[b], new[b]) for b in range(min(args.exact, batch))], dtype=torch.float64
    )

    def add(method: str, values, seconds: float, peak: float, refresh: float | None = None, **more) -> None:
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        shared = min(len(values), len(exact))
        error = values[:shared] - exact[:shared]
        spread = exact.std().item() if len(exact) > 1 else math.nan
        difference = (error.max() - error.min()).item() if shared > 1 else math.nan
        rows.append(
            {
                "d": dimension, "N": count, "n": size, "B": batch, "method": method, "seconds": seconds,
                "refresh_seconds": refresh, "peak_mib": peak,
                "relative_error": (error.abs() / exact[:shared]).max().item(),
                "difference_error": difference / spread, "distance": exact[0].item(), "spread": spread, **more,
            }
        )  # fmt: skip

    for method in args.methods:
        if method in ("sqrtm", "eigvals", "eigvalsh"):
            function = getattr(baselines, method)
            subsets = min(few, 1) if method == "sqrtm" else few
            values, seconds, peak = seconds_and_peak(
                lambda f=function, k=subsets: [f(indices[b], new[b]) for b in range(k)], device
            )
            add(method, values, seconds / subsets, peak)
            continue
        distance = FrechetDistance(real, method=method)
        if method == "direct":
            distance.fit(features)
            values, seconds, peak = seconds_and_peak(lambda d=distance: d.replaced(indices[:few], new[:few]), device)
            add("direct", values, seconds / few, peak)
            continue
        _, refresh, refresh_peak = seconds_and_peak(
            lambda d=distance: d.fit(features).replaced(indices[:1], new[:1]), device
        )  # with the eigendecomposition
        values, seconds, peak = seconds_and_peak(lambda d=distance: d.replaced(indices, new), device)
        _, credit_seconds, _ = seconds_and_peak(lambda d=distance: d.leave_one_in(indices, new), device)
        add(
            method, values, seconds / batch, peak, refresh, refresh_peak_mib=refresh_peak,
            leave_one_in_seconds=credit_seconds / batch,
        )  # fmt: skip
    seconds_of = {row["method"]: row["seconds"] for row in rows}
    for row in rows:
        row["times_ours"] = row["seconds"] / seconds_of["logdet"] if "logdet" in seconds_of else None
    return rows


_STATISTICS: dict[int, FeatureStatistics] = {}


def statistics_of(dimension: int, count: int) -> FeatureStatistics:
    if dimension not in _STATISTICS:
        _STATISTICS.clear()
        statistics = FeatureStatistics(dimension)
        for part in make_features(count, dimension, 0, generated=False).split(8192):
            statistics.update(part)
        _STATISTICS[dimension] = statistics
    return _STATISTICS[dimension]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "d", "N", "n", "B", "method", "s / subset", "× ours", "refresh s", "peak MiB", "rel. error", "diff. / std"
    )
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("d", "N", "n", "B", "method")),
            f"{row['seconds']:.2e}",
            "" if row["times_ours"] is None else f"{row['times_ours']:.0f}",
            "" if row["refresh_seconds"] is None else f"{row['refresh_seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['relative_error']:.0e}",
            f"{row['difference_error']:.0e}",
        )
    Console(width=119).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 768, 1024, 2048])
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 50000], help="reference set sizes N")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 50], help="rows replaced n")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128], help="subsets B")
    methods = ["sqrtm", "eigvals", "eigvalsh", "direct", "logdet"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--real", type=int, default=20000, help="real images in the statistics")
    parser.add_argument("--slow", type=int, default=2, help="subsets on which the slow methods are timed")
    parser.add_argument("--exact", type=int, default=8, help="subsets whose exact distance is computed")
    parser.add_argument(
        "--per-image", type=int, default=6400, help="n = 1: exact rewards of that many images; 0 skips"
    )
    parser.add_argument("--quick", action="store_true", help="d = 64 and 256, N = 1000, fewer real images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/reward.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.quick:
        args.dimensions, args.counts, args.batches, args.real, args.per_image = [64, 256], [1000], [16], 4000, 256
    sizes = [(n, b) for n in args.sizes for b in args.batches]
    rows: list[dict[str, Any]] = []
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    for d in args.dimensions:
        for count in args.counts:
            for n, b in sizes + ([(1, args.per_image)] if args.per_image else []):
                rows += measure(d, count, n, b, device, args)
                show(rows[-len(args.methods) :])
                args.output.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
