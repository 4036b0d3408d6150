# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Precision, recall, density and coverage: ours against the `prdc` package, which has to be installed for it.

    pip install --no-deps prdc==0.2
    OMP_NUM_THREADS=1 python benchmarks/manifold.py                   # 10,000 x 2,048 on both sides
    OMP_NUM_THREADS=1 python benchmarks/manifold.py --counts 50000 --skip-prdc --runs 1

Each measurement is a process of its own, ours and theirs in turn. Seconds are of the processor, so that other jobs on
the machine count little; memory is the process's peak, and what the computation added to what was resident before it,
features included. Features are synthetic: classes, heavy tails and a spectrum as ill-conditioned as Inception's.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from reward import make_features
from rich.console import Console
from rich.table import Table

from trl_distreward import precision_recall_density_coverage

SETS = ("real", "generated")


def measure(method: str, path: str, k: int) -> dict[str, float]:
    """One method in this process, on features that were made in another one."""
    features = torch.load(path, weights_only=True)  # read, not mapped: resident before the first measurement
    real, generated = features["real"], features["generated"]
    if method == "prdc":
        from prdc import compute_prdc
    before, started = peak(), time.process_time()
    if method == "prdc":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            values = {name: float(v) for name, v in compute_prdc(real.numpy(), generated.numpy(), k).items()}
    else:
        values = precision_recall_density_coverage(real, generated, k, progress=sys.stderr.isatty())
    seconds = time.process_time() - started
    return {**values, "seconds": seconds, "peak": peak(), "added": peak() - before}


def peak() -> float:
    """Peak resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_apart(*arguments: str) -> str:
    return subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_in_turn(methods: list[str], count: int, args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    size = ["--counts", str(count), "--dimension", str(args.dimension), "--k", str(args.k)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "features.pt")
        run_apart("--only", "make", "--features", path, *size)
        return [
            {name: json.loads(run_apart("--only", name, "--features", path, *size)) for name in methods}
            for _ in range(args.runs)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000], help="rows of each of the two sets")
    parser.add_argument("--dimension", type=int, default=2_048)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="of each method, in turn; the median is reported")
    parser.add_argument("--skip-prdc", action="store_true", help="measure ours alone")
    parser.add_argument("--only", choices=["make", "ours", "prdc"], help="one part of the work, in this process")
    parser.add_argument("--features", help="file of the features, of such a part")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.only == "make":
        made = {name: make_features(args.counts[0], args.dimension, i, i == 1) for i, name in enumerate(SETS)}
        torch.save(made, args.features)
        return
    if args.only:
        print(json.dumps(measure(args.only, args.features, args.k)))
        return
    methods = ["ours"] if args.skip_prdc else ["ours", "prdc"]
    results = []
    for count in args.counts:
        runs = measure_in_turn(methods, count, args)
        medians = {
            name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in methods
        }
        results.append({"count": count, "dimension": args.dimension, "k": args.k, "medians": medians, "runs": runs})
        show(results[-1])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scikit-learn")}
    if not args.skip_prdc:
        versions["prdc"] = importlib.metadata.version("prdc")
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if args.output.exists():  # other sizes stay
        kept = json.loads(args.output.read_text())["results"]
        results += [old for old in kept if old["count"] not in args.counts]
    args.output.write_text(json.dumps({"machine": machine, "versions": versions, "results": results}, indent=2) + "\n")


def show(result: dict) -> None:
    columns = ["seconds", "peak", "added", "precision", "recall", "density", "coverage"]
    table = Table("", *columns, title=f"{result['count']:,} x {result['dimension']:,}, k={result['k']}")
    for name, values in result["medians"].items():
        table.add_row(name, *(f"{values[c]:.1f}" if c in columns[:3] else f"{values[c]:.6f}" for c in columns))
    if len(result["medians"]) == 2:
        ours, theirs = result["medians"]["ours"], result["medians"]["prdc"]
        table.add_row("ratio", *(f"{theirs[c] / ours[c]:.2f}" for c in columns[:3]))
    Console(width=119).print(table)


if __name__ == "__main__":
    main()
