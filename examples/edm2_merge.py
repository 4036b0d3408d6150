# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Learns how to merge EDM2's published snapshots, as in Table 2 of arXiv 2607.02291.

    accelerate launch --multi_gpu examples/edm2_merge.py --config examples/configs/edm2_merge_xs.yaml

Snapshots are converted once to pipeline folders in `pool_dir`; nothing in them is executed. The reward also needs
statistics of ImageNet 512x512: NVIDIA's `img512.pkl`, or a file of `trl-distreward statistics`. Options are those of
`trl-distreward merge` and these:
"""

import re
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from trl_distreward import MergeCoefficientConfig, load_pipeline
from trl_distreward.scripts import cli, convert
from trl_distreward.scripts.arguments import option
from trl_distreward.scripts.common import make_trl_parser
from trl_distreward.scripts.merge import MergeArguments, run

# Published names: thousands of training images, and the relative width of the average that the snapshot is
SNAPSHOT = re.compile(r"-(?P<kimg>\d{7})-(?P<std>\d\.\d{3})\.pkl$")


@dataclass
class EDM2MergeArguments(MergeArguments):
    """EDM2's snapshots instead of a model and its checkpoints."""

    model: str = option("", "Not needed: the last snapshot is the model.")
    snapshots: list[str] = option([], "EDM2's .pkl files, e.g. edm2-img512-xs-2147483-0.100.pkl.")
    pool_dir: str = option("edm2-pool", "Folder of the converted snapshots.")
    vae: str | None = option(None, "Hub id or folder of the VAE; by default the snapshots'.")


def convert_snapshots(arguments: EDM2MergeArguments) -> tuple[list[str], list[float], list[float]]:
    """Converts snapshots; returns their folders, training times and widths in the order of training."""
    found = []
    for snapshot in arguments.snapshots:
        name = SNAPSHOT.search(snapshot)
        if name is None:
            raise ValueError(
                f"{snapshot} does not tell its training time and width: keep the published name, e.g. "
                "edm2-img512-xs-2147483-0.100.pkl."
            )
        found.append((float(name["kimg"]), float(name["std"]), Path(snapshot)))
    if len(found) < 2:
        raise ValueError(f"{len(found)} snapshots: give at least 2 to merge.")
    found.sort()
    folders = [Path(arguments.pool_dir) / snapshot.stem for _, _, snapshot in found]
    with PartialState().main_process_first():
        for (_, _, snapshot), folder in zip(found, folders, strict=True):
            # only the last one, which the others are merged into, needs a VAE
            extra = ["--vae", arguments.vae] if arguments.vae else []
            extra += [] if folder == folders[-1] else ["--no-embed-vae"]
            if not folder.exists():
                convert.main(["edm2", str(snapshot), str(folder), *extra])
    return [str(folder) for folder in folders], [kimg for kimg, _, _ in found], [std for _, std, _ in found]


def main(argv: list[str] | None = None) -> None:
    parser = make_trl_parser((EDM2MergeArguments, MergeCoefficientConfig), __doc__)
    arguments, config = parser.parse_args_and_config(argv)
    folders, config.checkpoint_times, config.checkpoint_stds = convert_snapshots(arguments)
    run(arguments, config, load_pipeline(arguments.model or folders[-1]), folders)


if __name__ == "__main__":
    cli.run("edm2_merge.py", main)
