# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
A candidate merge of a pool of checkpoints, against reading the pool's files once from the page cache.

    OMP_NUM_THREADS=1 python benchmarks/merge.py                                          # 8 x 10M parameters
    OMP_NUM_THREADS=1 python benchmarks/merge.py --members 8 --parameters 124713253       # EDM2-XS: 4 GB of files

Seconds are of the processor, in rounds that take turns, and the fastest round counts. `read` is read(2) of every file
into one buffer; `scan` sums the elements of the mapped tensors, which touches each once. Memory is what the process
holds beyond the mapped files while it merges into a network, the network itself included, in models.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors.torch import save_file
from torch import nn

from trl_distreward import CheckpointPool

BUFFER = bytearray(1 << 20)


def shapes(parameters: int) -> list[int]:
    """Sizes of tensors as unequal as a network's: scalars, vectors, and weights that double from stage to stage."""
    sizes = [1] * min(37, parameters // 100)
    rest, step = parameters - sum(sizes), 0
    while rest > 0:
        size = min(rest, max(1, parameters // (400, 200, 100, 30)[step % 4]))
        sizes.append(size)
        rest, step = rest - size, step + 1
    return sizes


def make_files(folder: Path, members: int, parameters: int) -> None:
    for member in range(members):
        generator = torch.Generator().manual_seed(member)
        tensors = {f"{i:04d}": torch.rand(n, generator=generator) for i, n in enumerate(shapes(parameters))}
        save_file(tensors, folder / f"{member}.safetensors")


def read(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(BUFFER):
                pass


def scan(pool: CheckpointPool) -> None:
    for member in range(len(pool)):
        for key in pool.keys:
            pool.tensor(member, key).sum()


def anonymous_memory() -> int:
    """Bytes that this process holds and that are not in files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: memory is measured on Linux only.")


def most_memory(call: Callable[[], None]) -> int:
    """The most of `anonymous_memory` while a call runs, looked at every millisecond."""
    most, done = anonymous_memory(), Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous_memory())

    watcher = Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(most, anonymous_memory())


def measure(members: int, parameters: int, rounds: int, folder: Path) -> dict:
    # in another process, whose memory is gone when it ends
    maker = get_context("spawn").Process(target=make_files, args=(folder, members, parameters))
    maker.start()
    maker.join()
    paths = [folder / f"{member}.safetensors" for member in range(members)]
    weights = torch.rand(members, dtype=torch.float64)
    weights /= weights.sum()
    pool = CheckpointPool(paths)
    before = anonymous_memory()
    network = nn.ParameterDict({key: torch.empty(shape) for key, shape in pool.shapes.items()})
    phases: dict[str, Callable[[], None]] = {
        "read": lambda: read(paths),
        "scan": lambda: scan(pool),
        "merge": lambda: pool.merge_into(network, weights),
    }
    peak = most_memory(phases["merge"]) - before
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    read(paths)
    for _ in range(rounds):
        for name, phase in phases.items():
            started = time.process_time()
            phase()
            seconds[name].append(time.process_time() - started)
    fastest = {name: min(values) for name, values in seconds.items()}
    return {
        "members": members,
        "parameters": parameters,
        "tensors": len(pool.keys),
        "bytes": sum(path.stat().st_size for path in paths),
        "seconds": fastest,
        "rounds": seconds,
        "merge_over_read": fastest["merge"] / fastest["read"],
        "merge_over_scan": fastest["merge"] / fastest["scan"],
        "peak_models_beyond_mapping": peak / (4 * parameters),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the files are made and deleted; a temporary one by default")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.members, args.parameters, args.rounds, Path(folder))
    for name, value in result["seconds"].items():
        print(f"{name:6} {value:.3f} s  {result['bytes'] / value / 1e9:.1f} GB/s")
    print(f"merge / read {result['merge_over_read']:.2f}, merge / scan {result['merge_over_scan']:.2f}")
    print(f"memory beyond the mapping: {result['peak_models_beyond_mapping']:.2f} models, the network included")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
