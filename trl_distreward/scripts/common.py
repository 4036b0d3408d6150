# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Options and helpers that several commands share."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from trl import TrlParser

from ..metrics.clip import JointTextFeatures, load_clip
from ..metrics.extractors import load_feature_extractor
from . import cli

Options = dict[str, Any]  # of a function, by name
EXTRACTOR_HELP = (
    "inception, dinov2, clip, folder or Hub id of a vision backbone, or dotted path of a callable; with options after "
    "commas, such as inception,resize=clean or ./backbone,pooling=mean,size=256,mean=0.5:0.5:0.5,std=0.5:0.5:0.5"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description as it is written, and the default of every option."""


class RecipeParser(cli.Parser, TrlParser):
    """Parser of options on the command line and in a YAML file, which are checked alike."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: bool) -> tuple:
        given = list(sys.argv[1:] if args is None else args)
        parts = (each.split("=", 1) if each.startswith("--config=") else [each] for each in given)
        given = [part for each in parts for part in each]
        if given[-1:] == ["--config"]:
            self.error("--config: name a YAML file")
        return super().parse_args_and_config(given, **options)

    def set_defaults_with_config(self, **given: object) -> list[str]:
        actions = {action.dest: action for action in self._actions}
        cli.refuse_unknown(given, actions)
        for name, value in given.items():
            action = actions[name]
            if action.nargs == "+" and isinstance(value, str):
                given[name] = [value]
            elif action.nargs is None and action.type in (int, float) and value is not None:
                given[name] = str(value)  # argparse checks strings alone
        return super().set_defaults_with_config(**given)


def make_trl_parser(dataclasses: Sequence[type], description: str | None, prog: str | None = None) -> TrlParser:
    """Returns a parser whose options are fields of dataclasses, on the command line or in a YAML file."""
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"  # there are about two hundred options
    shown: dict[str, Any] = {"prog": prog, "usage": usage, "description": description, "dataclass_types": dataclasses}
    return RecipeParser(formatter_class=HelpFormatter, allow_abbrev=False, **shown)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add("--resize", type=int, metavar="N", help="crop and resize to N x N, as ImageNet is prepared")
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    add("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    add("--num-workers", type=int, default=4, help="worker processes that decode, for each process (default: 4)")
    add("--work-dir", help="folder for unfinished work, which all processes share (default: OUTPUT.work, removed)")
    add = parser.add_argument_group("datasets").add_argument
    add("--split", help="split, if there are several")
    add("--config", help="configuration of the dataset")
    add("--revision", help="branch, tag or commit")
    add("--data-files", nargs="+", help="files of a format such as webdataset or parquet")
    add("--streaming", action="store_true", help="read without downloading first")
    add("--image-column", help="column of images, if there are several")


def image_options(arguments: argparse.Namespace) -> tuple[Options, Options]:
    """Returns options of [`~evaluation.open_images`] for datasets, and of [`~evaluation.collect_features`]."""
    given = vars(arguments)
    dataset = ("split", "config", "revision", "data_files", "streaming", "image_column")
    images = ("batch_size", "resize", "skip_corrupt", "num_workers")
    return {name: given[name] for name in dataset}, {name: given[name] for name in images}


def split_spec(spec: str) -> tuple[str, Options]:
    """Splits `NAME[,option=value…]`; a size is a number, and `0.5:0.5:0.5` a value for each colour."""
    name, *pairs = spec.split(",")
    options: Options = dict(pair.partition("=")[::2] for pair in pairs)
    options |= {key: int(options[key]) for key in ("size",) if key in options}
    options |= {key: tuple(map(float, options[key].split(":"))) for key in ("mean", "std") if key in options}
    return name, options


def find_extractor(spec: str | None, prompt_encoder: str | None = None, prompt_scale: float = 1.0) -> nn.Module:
    """Loads the extractor `NAME[,option=value…]`, joined to prompts by a CLIP model if `prompt_encoder` is given."""
    name, options = split_spec(spec or "inception")
    extractor: Any = None if spec is None and prompt_encoder else load_feature_extractor(name, **options)
    if prompt_encoder is None:
        return extractor
    clip = load_clip(prompt_encoder)
    return JointTextFeatures(extractor or clip, clip.prompts, prompt_scale)
