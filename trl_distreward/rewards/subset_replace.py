# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The distribution-wise reward: minus the distance to real data after replacing part of a generated set.

Eq. 4 of [arXiv 2607.02291](https://huggingface.co/papers/2607.02291): with a reference set 𝒢 of N generated images
and n of them, g, replaced by new images g' under the same conditions, `R(g') = -D((𝒢 ∖ g) ∪ g', real)`.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..metrics.composite import DebiasedDistance, SumDistance, supports
from ..metrics.distance import build_distance
from ..metrics.extractors import FeatureExtractor, extract_features, extractor_digest, freeze, module_of
from ..metrics.image_metrics import FeatureDistance

CREDITS = ("shared", "leave_one_in")


class SubsetReplaceReward:
    """
    Minus the distance from real data of a reference set in which a subset was replaced.

    Args:
        feature_extractor (`Callable`, `torch.nn.Module` or `dict` of them):
            maps uint8 images `(B, C, H, W)` to features `(B, d)`. A dictionary names several feature spaces.
        real_statistics ([`FeatureStatistics`], path, or `dict` of them with the extractors' names):
            the real data in each feature space.
        distance (`str` or `Callable`, *optional*, defaults to `"frechet"`):
            `"frechet"`, `"kernel"`, `"sliced_wasserstein"`, or a function from what `real_statistics` holds to a
            [`~metrics.Distance`]. The latter two compare with the real features `(M, d)` themselves.
        space_weights (`dict[str, float]`, *optional*):
            weights of the feature spaces, 1 by default. With more than one space each distance is first divided by
            the one the first reference set had, so that no space dominates by its units.
        credit (`str`, *optional*, defaults to `"shared"`):
            `"shared"`: the images of a subset share its reward (Eq. 4). `"leave_one_in"`: each has its own, what the
            updated set's distance gains by having it: `D(without it) - D(with it)`, exactly. It does not pay for more
            of what the other images of the subset already supply.
        control_variate (`bool`, *optional*, defaults to `False`):
            adds to a shared reward what the removed images' absence changes by itself, about its mean over the
            reference set. That part of the reward says nothing of the new images; without it the reward keeps its
            mean and loses variance.
        debias (`bool`, *optional*, defaults to `False`):
            extrapolates distances to an infinite generated set ([`~metrics.DebiasedDistance`]), so that shrinking the
            spread of the images is not rewarded; costs about three times as much.

    Example:

    ```python
    >>> reward = SubsetReplaceReward(inception, "imagenet256.npz")
    >>> reward.set_reference(reward.extract(reference_images))  # (N, C, H, W) uint8
    >>> reward(images, slots=slots)  # (B * n, C, H, W) and (B, n) -> B * n floats
    ```
    """

    __name__ = "subset_replace"

    def __init__(
        self,
        feature_extractor: FeatureExtractor | Mapping[str, FeatureExtractor],
        real_statistics: Any,
        distance: str | Callable[[Any], Any] = "frechet",
        *,
        space_weights: Mapping[str, float] | None = None,
        credit: str = "shared",
        control_variate: bool = False,
        debias: bool = False,
    ):
        if credit not in CREDITS:
            raise ValueError(f"credit={credit!r} is unknown: choose one of {', '.join(map(repr, CREDITS))}.")
        if control_variate and credit != "shared":
            raise ValueError(
                f"control_variate=True has nothing to take from credit={credit!r}, which does not contain the removed "
                "images: leave it off."
            )
        self.credit, self.control_variate = credit, control_variate
        if isinstance(feature_extractor, Mapping):
            self.extractors = dict(feature_extractor)
            if not isinstance(real_statistics, Mapping) or set(real_statistics) != set(self.extractors):
                given = sorted(real_statistics) if isinstance(real_statistics, Mapping) else real_statistics
                raise ValueError(
                    f"real_statistics ({given}) must be a dictionary with the extractors' names "
                    f"({sorted(self.extractors)})."
                )
        else:
            self.extractors, real_statistics = {"features": feature_extractor}, {"features": real_statistics}
        for name, extractor in self.extractors.items():
            if not callable(extractor):
                raise TypeError(f"feature extractor {name!r} is a {type(extractor).__name__}: it must be callable.")
            freeze(extractor)
        self.distances = {
            name: build_distance(distance, real_statistics[name], extractor)
            for name, extractor in self.extractors.items()
        }
        self._plain = {name: copy.copy(d) for name, d in self.distances.items()}  # share the real side
        self.debias = debias
        if debias:
            self.distances = {name: DebiasedDistance(partial(copy.copy, d)) for name, d in self.distances.items()}
        needed = ["leave_one_in", "delete_one"] if credit == "leave_one_in" else ["delete_one"] * control_variate
        for name, built in self.distances.items():
            lacking = [method for method in needed if not supports(built, method)]
            if lacking:
                raise TypeError(
                    f"the distance of {name!r}, a {type(built).__name__}, has no {' and no '.join(lacking)}: use "
                    "credit='shared' without control_variate, or a distance of this library."
                )
        self.space_weights = dict.fromkeys(self.extractors, 1.0) | dict(space_weights or {})
        if set(self.space_weights) != set(self.extractors):
            raise ValueError(f"space_weights name {sorted(self.space_weights)}, extractors {sorted(self.extractors)}.")
        self.features: dict[str, Tensor] = {}  # reference set, per space (N, d) float32
        self.first_distances: dict[str, float] = {}
        self._removal_effects: Tensor | None = None
        self._given_scales = self._scales

    # ---- features ----

    def to(self, device: torch.device) -> "SubsetReplaceReward":
        for extractor in self.extractors.values():
            module = module_of(extractor)
            if module is not None:
                module.to(device)
        return self

    def extract(
        self, images: Tensor, conditions: Any = None, check_finite: bool = True, gradient: bool = False
    ) -> dict[str, Tensor]:
        """
        Features of uint8 images `(M, C, H, W)` in each space, `(M, d)` float32; conditions go to the extractors that
        need them, such as [`JointFeatures`]. With `gradient` images are float32 in the same range, and features carry
        gradients to them.

        Raises:
            ValueError: an extractor changed the batch size, gave another dimension than the statistics have, or
                NaN or infinite values, unless `check_finite=False`.
        """
        return {
            name: extract_features(
                extractor,
                images,
                conditions,
                dimension=getattr(self.distances[name], "dimension", None),
                name=name,
                check_finite=check_finite,
                gradient=gradient,
            )
            for name, extractor in self.extractors.items()
        }

    def metrics(self) -> dict[str, FeatureDistance]:
        """The same distances as evaluation metrics of whole sets, one per space; neither debiased nor normalized."""
        plain = {
            name: d.without_scales() if isinstance(d, SumDistance) else copy.copy(d) for name, d in self._plain.items()
        }
        return {name: FeatureDistance.of(extractor, plain[name]) for name, extractor in self.extractors.items()}

    # ---- reference set ----

    @property
    def reference_distances(self) -> dict[str, float]:
        """Distance of the current reference set from real data, per feature space."""
        return {name: distance.value for name, distance in self.distances.items()} if self.features else {}

    @property
    def baseline(self) -> float:
        """What an image, or a subset of images, like those of the reference set would get."""
        if self.credit == "leave_one_in":
            return self.removal_effects.mean().item()
        return -sum(self.weighted_distances.values())

    @property
    def weighted_distances(self) -> dict[str, float]:
        """Of the reference set from real data, each as it counts in the reward."""
        return {name: self._weight(name) * distance.value for name, distance in self.distances.items()}

    @property
    def knows_removal(self) -> bool:
        """Whether the distances can tell what taking an image away does."""
        return all(supports(distance, "delete_one") for distance in self.distances.values())

    @property
    def removal_effects(self) -> Tensor:
        """`(N,)`, float64: what the distance changes by when a reference image is taken away, weighted over spaces."""
        if self._removal_effects is None:
            every = torch.arange(len(next(iter(self.features.values()))))
            parts = [self._weight(name) * distance.delete_one(every) for name, distance in self.distances.items()]
            self._removal_effects = torch.stack(parts).sum(dim=0)
        return self._removal_effects

    def _weight(self, name: str) -> float:
        scale = self.first_distances[name] if len(self.distances) > 1 else 1.0
        return self.space_weights[name] / scale

    @property
    def _scales(self) -> dict[str, dict[str, float]]:
        return {name: distance.scales for name, distance in self.distances.items() if hasattr(distance, "scales")}

    def reset(self) -> None:
        """Forgets the reference set, and the units that the first one gave: the next one is the first again."""
        self.features, self.first_distances, self._removal_effects = {}, {}, None
        for name, scales in self._given_scales.items():
            self.distances[name].scales = scales

    def set_reference(self, features: Mapping[str, Tensor]) -> None:
        """Takes `features` `(N, d)` per space as the reference set."""
        self.features = {name: features[name].float() for name in self.extractors}
        self._removal_effects = None
        for name, distance in self.distances.items():
            distance.fit(self.features[name])
        if not self.first_distances:
            # of a debiased distance, which may be below 0, the plain one tells the units
            members = {name: getattr(distance, "whole", distance) for name, distance in self.distances.items()}
            first = {name: member.value for name, member in members.items()}
            bad = {name: value for name, value in first.items() if not value > 0}
            if bad and len(first) > 1:
                raise ValueError(
                    f"the first reference set has distances {bad}, which cannot be divided by: leave these spaces "
                    "out, or use KernelDistance(..., unbiased=False), which is never below 0."
                )
            self.first_distances = first

    def update_reference(
        self, slots: Tensor, features: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> None:
        """
        Leaves new images in the places they were judged in: the *rolling* reference set.

        Args:
            slots (`torch.LongTensor` of shape `(B, n)`): places; of a place's several candidates one stays at random.
            features (`dict` of `torch.Tensor` of shape `(B * n, d)`): the new images' features.
            generator (`torch.Generator`, *optional*): chooses among candidates.
        """
        flat = slots.flatten()
        order = torch.randperm(len(flat), generator=generator).to(flat.device)
        shuffled = flat[order]
        kept, inverse = shuffled.unique(return_inverse=True)
        winner = torch.full((len(kept),), len(flat), dtype=torch.long, device=flat.device)
        winner = winner.scatter_reduce(0, inverse, torch.arange(len(flat), device=flat.device), "amin")
        chosen = order[winner]
        updated = {}
        for name, reference in self.features.items():
            updated[name] = reference.index_copy(
                0, kept.to(reference.device), features[name][chosen.to(features[name].device)].to(reference)
            )
        self.set_reference(updated)

    # ---- reward ----

    def subset_rewards(self, slots: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """
        Rewards of subsets (Eq. 4), whatever the credit.

        Args:
            slots (`torch.LongTensor` of shape `(B, n)`): replaced places of the reference set.
            features (`dict` of `torch.Tensor` of shape `(B * n, d)`): the new images' features, subset by subset.

        Returns:
            `torch.Tensor` of shape `(B,)`, float64.
        """
        return self._total("replaced", slots, features)

    def score(self, slots: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """
        Rewards as `credit` and `control_variate` have them; arguments as in [`~SubsetReplaceReward.subset_rewards`].

        Returns:
            `torch.Tensor`, float64: shape `(B,)` if a subset's images share their reward, else `(B, n)`.
        """
        if self.credit == "leave_one_in":
            return self._total("leave_one_in", slots, features)
        rewards = self.subset_rewards(slots, features)
        if self.control_variate:
            effects = self.removal_effects
            # what the absence of these slots' images does by itself, lower on average by as much: the mean stays
            rewards = rewards + (effects[slots.to(effects.device)] - effects.mean()).sum(dim=1)
        return rewards

    def gradient(self, slots: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Gradient of the weighted distance of the set in which all of `slots` are replaced, by the new features.

        Args:
            slots (`torch.LongTensor` of shape `(M,)`): distinct places.
            features (`dict` of `torch.Tensor` of shape `(M, d)`): of the new images.

        Returns:
            `dict` of `torch.Tensor` of shape `(M, d)`, float64.
        """
        return {
            name: self._weight(name) * distance.gradient(slots[None], features[name][None])[0]
            for name, distance in self.distances.items()
        }

    def _total(self, method: str, slots: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        if not self.features:
            raise ValueError("the reward has no reference set yet: call set_reference(extract(images)) first.")
        parts = [
            self._weight(name) * getattr(distance, method)(slots, features[name].view(*slots.shape, -1))
            for name, distance in self.distances.items()
        ]
        return -torch.stack(parts).sum(dim=0)

    def __call__(
        self, images: Tensor, conditions: Any = None, slots: Tensor | None = None, **kwargs: Any
    ) -> list[float]:
        """
        One reward per image, as TRL's reward functions give.

        Args:
            images (`torch.Tensor` of shape `(B * n, C, H, W)`, uint8): new images, subset by subset.
            slots (`torch.LongTensor` of shape `(B, n)`): the places they would take.
        """
        if slots is None or len(images) != slots.numel():
            shape = None if slots is None else tuple(slots.shape)
            raise ValueError(f"{len(images)} images need slots of shape (B, n) with as many entries, got {shape}.")
        rewards = self.score(slots, self.extract(images, conditions))
        if rewards.ndim == 1:  # shared by the images of a subset
            rewards = rewards.repeat_interleave(slots.shape[1])
        return rewards.flatten().tolist()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """The reference set's features and the first distances; moments follow from the features."""
        return {
            "features": dict(self.features),
            "first_distances": dict(self.first_distances),
            "scales": self._scales,
            "extractors": self._identities,
        }

    @cached_property
    def _identities(self) -> dict[str, dict[str, str | None]]:
        """What tells extractors apart: their names, how they resize, and a digest of their weights."""
        return {
            space: {
                "name": getattr(extractor, "name", None),
                "resize": getattr(extractor, "resize", None),
                "weights": extractor_digest(extractor),
            }
            for space, extractor in self.extractors.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["features"] and set(state["features"]) != set(self.extractors):
            raise ValueError(
                f"the checkpoint's feature spaces {sorted(state['features'])} are not this reward's "
                f"{sorted(self.extractors)}: resume with the reward the run was started with."
            )
        for space, held in state.get("extractors", {}).items():  # version 0.1.0 did not keep them
            own = self._identities.get(space)
            if own is not None and own != held:
                raise ValueError(
                    f"the checkpoint's features {space!r} are of the extractor {held}, and this reward's is {own}: "
                    "resume with the reward the run was started with."
                )
        self.first_distances = dict(state["first_distances"])
        for name, scales in state["scales"].items():
            self.distances[name].scales = scales
        if state["features"]:
            self.set_reference(state["features"])
