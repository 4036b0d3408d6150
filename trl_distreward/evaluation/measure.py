# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Metrics of one set of images against real data, in one feature space."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..metrics.extractors import extractor_digest
from ..metrics.scores import FRECHET, MANIFOLD, feature_metrics
from ..metrics.statistics import check_extractor
from .collect import CollectedFeatures, collect_features
from .real import RealPath
from .sources import ImageSource

LOGIT_METRICS = ("inception_score",)
# what [`~metrics.scores.feature_metrics`] needs where nothing else is chosen: a subset, splits, 5 neighbours of a row
_FEWEST = {"kid": 1_000, "inception_score": 10} | dict.fromkeys(MANIFOLD, 6)
_FEWEST_REAL = {"kid": 1_000} | dict.fromkeys(MANIFOLD, 6)
_OF_THE_WHOLE_SET = ("kid", "inception_score", "frechet_infinity", "fid_infinity")  # with --spread as well


def fewest_images(metric: str, dimension: int | None = None, spread: int = 0) -> int:
    """Of how many generated images a metric can be computed; of an extrapolation where the `dimension` is known."""
    if metric in ("frechet_infinity", "fid_infinity"):
        return 4 * (dimension or 1)  # a line from twice the dimension to twice of that
    needed = _FEWEST.get(metric, 2)
    return 2 * needed if spread and metric not in _OF_THE_WHOLE_SET else needed


class FeaturesAndLogits(nn.Module):
    """The features of Inception's output, and its logits without bias, side by side, in one pass."""

    def __init__(self, inception: Any):
        super().__init__()
        self.inception = inception

    def forward(self, images: Tensor) -> Tensor:
        names = (self.inception.output, "logits_unbiased")
        found = self.inception.outputs(images, names)
        return torch.cat([found[name] for name in names], dim=1)


def takes_logits(extractor: Any) -> bool:
    """Whether the Inception Score is computed beside these features: pool3's alone, so that it is computed once."""
    return getattr(extractor, "output", None) == "pool3"


@dataclass(frozen=True)
class FeatureSpace:
    """
    An extractor, and the real data in its features.

    Args:
        extractor (`torch.nn.Module`): as [`~metrics.extractors.load_feature_extractor`] gives it.
        real ([`~evaluation.real.RealPath`]): the real data.
        metrics (`list[str]`): of [`~metrics.scores.feature_metrics`].
        open_real (`Callable`): opens the real images, where `real` is of images.
    """

    extractor: Any
    real: RealPath
    metrics: Sequence[str]
    open_real: Callable[[], ImageSource]

    @property
    def name(self) -> str:
        return self.extractor.name

    @property
    def label(self) -> str:
        """A name for a folder."""
        return "-".join(re.sub(r"[^\w.-]", "-", part) for part in dict.fromkeys((self.name, self.extractor.resize)))

    @property
    def needs_logits(self) -> bool:
        return any(metric in LOGIT_METRICS for metric in self.metrics)

    @property
    def by_features(self) -> list[str]:
        """Metrics for which moments are not enough."""
        return [metric for metric in self.metrics if metric not in (*FRECHET, *LOGIT_METRICS)]

    @property
    def collects_real(self) -> bool:
        """Whether features of the real images have to be made."""
        return self.real.must_collect(bool(self.by_features))

    def check(self, num_images: int | None = None, spread: int = 0) -> None:
        """
        Before any image is made: whether the real data are there, are of this extractor, and suffice.

        Args:
            num_images (`int`, *optional*): how many images are to be judged, where that is known.
            spread (`int`, *optional*, defaults to 0): of [`~metrics.scores.feature_metrics`].

        Raises:
            FileNotFoundError: there is nothing at the real data's path.
            ValueError: statistics of another extractor, none of the features that a metric needs, or too few images.
        """
        if spread < 0 or spread == 1:
            raise ValueError(f"--spread {spread} must be at least 2, or 0 for none: one value has no spread.")
        statistics = self.real.moments_in_file()
        if statistics is not None:
            check_extractor(
                statistics.metadata,
                statistics.dimension,
                extractor=self.name,
                resize=self.extractor.resize,
                weights=extractor_digest(self.extractor),
                extractor_dimension=self.extractor.dimension,
                path=self.real.path,
            )
        if self.by_features and not (self.real.images or self.real.features):
            raise ValueError(
                f"{', '.join(self.by_features)} of {self.name}: compared with real features, but {self.real.path} "
                "holds moments alone: give real images, or statistics made with --features."
            )
        real_count = self.real.feature_count()
        if self.collects_real:
            real_count = getattr(self.open_real(), "__len__", lambda: None)()
        dimension = self.extractor.dimension if statistics is None else statistics.dimension
        self._check_counts(num_images, real_count, dimension, spread)
        if self.needs_logits and not takes_logits(self.extractor):
            raise ValueError(
                f"inception_score is of Inception's logits, which come with 'inception', not with {self.name}: leave "
                "it out, or add inception to --feature-extractor."
            )
        if not self.metrics:
            raise ValueError(f"no metric is asked of {self.name}: give one besides inception_score, or leave it out.")

    def _check_counts(self, made: int | None, real: int | None, dimension: int | None, spread: int) -> None:
        for metric in self.metrics:
            needs = (
                ("generated", made, fewest_images(metric, dimension, spread)),
                ("real", real, _FEWEST_REAL.get(metric, 2)),
            )
            for kind, count, fewest in needs:
                if count is not None and count < fewest:
                    raise ValueError(
                        f"{metric} of {self.name} needs {fewest} {kind} images, but there are {count}: give more, or "
                        f"leave {metric} out{' or --spread' if spread else ''}."
                    )

    def measure(
        self,
        generated: ImageSource,
        folder: Path,
        *,
        seed: int = 0,
        spread: int = 0,
        collected: list[CollectedFeatures] | None = None,
        **options: Any,
    ) -> dict[str, Any] | None:
        """
        One entry of a report's results, in the main process; all call it.

        Args:
            generated ([`ImageSource`]): the images to judge.
            folder (`Path`): for unfinished work.
            seed, spread: of [`~metrics.scores.feature_metrics`].
            collected (`list`, *optional*): is given what lies in `folder` at the end, for the caller to remove.
            options: of [`~evaluation.collect.collect_features`]; `resize` and `skip_corrupt` for generated images too.
        """
        state = PartialState()
        about = {"description": {"resize": self.extractor.resize}, **options}
        real, source = None, {}
        if self.collects_real:
            images = self.open_real()
            source = {name: value for name, value in images.description.items() if name in ("split", "revision")}
            real = collect_features(images, self.extractor, folder / f"real-{self.label}", name=self.name, **about)
        network = FeaturesAndLogits(self.extractor) if self.needs_logits else self.extractor
        name = f"{self.name} with logits" if self.needs_logits else self.name
        kept = folder / f"generated-{self.label}{'-with-logits' if self.needs_logits else ''}"
        made = collect_features(generated, network, kept, name=name, **about)
        if collected is not None:
            collected += [made] if real is None else [real, made]
        if not state.is_main_process:
            return None
        data = self.real.load(real, source)
        features, logits = made.features(), None
        if self.needs_logits:
            features, logits = features[:, : self.extractor.dimension], features[:, self.extractor.dimension :]
        check_extractor(
            data.statistics.metadata,
            data.statistics.dimension,
            extractor=self.name,
            extractor_dimension=features.shape[1],
            path=self.real.path,
        )
        moments = [m for m in self.metrics if m in FRECHET]
        others = [m for m in self.metrics if m not in FRECHET]
        found = feature_metrics(data.statistics, features, moments, seed=seed, spread=spread) if moments else {}
        if others:
            against = data.statistics if data.features is None else data.features
            found |= feature_metrics(against, features, others, logits=logits, seed=seed, spread=spread, progress=True)
        return {
            "extractor": self.name,
            "resize": self.extractor.resize,
            "real": data.description,
            "images": made.count,
            "skipped": made.skipped,
            "metrics": found,
        }
