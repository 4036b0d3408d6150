# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The distribution-wise reward: minus the distance to real data after replacing part of a generated set.

Eq. 4 of [arXiv 2607.02291](https://huggingface.co/papers/2607.02291): a reference set 𝒢 holds N generated images. The
new images g' take the places of n of them, g, that have the same conditions. `R(g') = -D((𝒢 ∖ g) ∪ g', real)`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..conditions import Conditions
from ..evaluation.image_metrics import FeatureDistance
from ..evaluation.real import RealSource, build_distance
from ..files import State
from ..metrics.distance import Distance
from ..metrics.extractors import FeatureExtractor, describe_extractor, extract_features, freeze, move

CREDITS = ("shared", "leave_one_in")


class SubsetReplaceReward:
    """
    Minus the distance from real data of a reference set in which a subset was replaced.

    Args:
        feature_extractor (`Callable`, `torch.nn.Module` or `dict` of them): maps uint8 images `(B, C, H, W)` to
            features `(B, d)`. A dictionary names several feature spaces.
        real_statistics: the real data: [`FeatureStatistics`], features `(M, d)`, a statistics file, a folder of images
            or a `datasets.Dataset` of them, see [`~evaluation.real_data`]; or a dictionary of these under the
            extractors' names.
        distance (`str` or `Callable`, *optional*, defaults to `"frechet"`): `"frechet"`, `"kernel"` (compares with the
            real features `(M, d)` themselves), or a function from what `real_statistics` holds to a
            [`~metrics.Distance`].
        real_resize (`int`, *optional*): side to which real images are cropped and resized; the generator's.
        space_weights (`dict[str, float]`, *optional*): weights of the feature spaces, 1 by default. With more than one
            space, each distance is first divided by the value it had for the first reference set, so that no space
            dominates by its units.
        credit (`str`, *optional*, defaults to `"shared"`): `"shared"`: the images of a subset share its reward (Eq.
            4). `"leave_one_in"`: each image gets its own reward, `D(updated set without it) - D(updated set)`,
            computed exactly, minus what the images of its class in the reference set get on average. It does not pay
            for more of what the other images of the subset already supply.
        control_variate (`bool`, *optional*, defaults to `False`): adds to a shared reward the change that removing the
            old images causes by itself, minus its mean over their class. That part of the reward says nothing about
            the new images: the mean stays the same, the variance falls.

    Example:

    ```python
    >>> reward = SubsetReplaceReward(inception, "imagenet256.npz")
    >>> reward.set_reference(reward.extract(reference_images))  # (N, C, H, W) uint8
    >>> reward(images, slots=slots)  # (B * n, C, H, W) and (B, n) -> B * n floats
    ```
    """

    __name__ = "subset_replace"

    groups: Tensor | None = None  # group of each slot (N,), see `centre_by`
    features: dict[str, Tensor]  # reference set, per space (N, d) float32
    first_distances: dict[str, float]
    _removal_effects: Tensor | None

    def __init__(
        self,
        feature_extractor: FeatureExtractor | Mapping[str, FeatureExtractor],
        real_statistics: RealSource | Mapping[str, RealSource],
        distance: str | Callable[..., Distance] = "frechet",
        *,
        real_resize: int | None = None,
        space_weights: Mapping[str, float] | None = None,
        credit: str = "shared",
        control_variate: bool = False,
    ):
        if credit not in CREDITS:
            raise ValueError(f"credit={credit!r} is unknown: choose one of {', '.join(map(repr, CREDITS))}.")
        if control_variate and credit != "shared":
            raise ValueError(f"control_variate=True corrects shared rewards, not credit={credit!r}: drop one of them.")
        self.credit, self.control_variate = credit, control_variate
        extractors, real = feature_extractor, real_statistics
        if not isinstance(extractors, Mapping):
            extractors, real = {"features": extractors}, {"features": real}
        if not isinstance(real, Mapping) or set(real) != set(extractors):
            raise ValueError(f"real_statistics must be a dictionary with the extractors' names {sorted(extractors)}.")
        self.extractors = {name: freeze(extractor) for name, extractor in extractors.items()}
        self.distances = {k: build_distance(distance, real[k], each, real_resize) for k, each in extractors.items()}
        needed = ["leave_one_in", "delete_one"] if credit == "leave_one_in" else ["delete_one"] * control_variate
        for name, built in self.distances.items():
            if not all(hasattr(built, method) for method in needed):
                remedy = "use credit='shared' without control_variate, or a distance of this library"
                raise TypeError(f"{type(built).__name__} of {name!r} has no {' or '.join(needed)}: {remedy}.")
        self.space_weights = dict.fromkeys(self.extractors, 1.0) | dict(space_weights or {})
        if set(self.space_weights) != set(self.extractors):
            raise ValueError(f"space_weights name {sorted(self.space_weights)}, extractors {sorted(self.extractors)}.")
        self.reset()

    # ---- features ----

    def to(self, device: torch.device) -> "SubsetReplaceReward":
        """Moves the networks behind the extractors."""
        for extractor in self.extractors.values():
            move(extractor, device)
        return self

    def extract(
        self, images: Tensor, conditions: Conditions | None = None, check_finite: bool = True, gradient: bool = False
    ) -> dict[str, Tensor]:
        """Features `(M, d)` of images `(M, C, H, W)` in each space; arguments as in [`~metrics.extract_features`]."""
        dimensions = {name: getattr(distance, "dimension", None) for name, distance in self.distances.items()}
        return {
            name: extract_features(extractor, images, conditions, dimensions[name], name, check_finite, gradient)
            for name, extractor in self.extractors.items()
        }

    def metrics(self) -> dict[str, FeatureDistance]:
        """Evaluation metrics of whole sets with the same distances, one per space, neither weighted nor divided."""
        return {
            name: FeatureDistance(extractor, torch.empty(0), lambda _, name=name: copy.copy(self.distances[name]))
            for name, extractor in self.extractors.items()
        }

    # ---- reference set ----

    @property
    def reference_distances(self) -> dict[str, float]:
        """Distance of the current reference set from real data, per feature space; empty without a set."""
        return {name: distance.value for name, distance in self.distances.items()} if self.features else {}

    @property
    def baseline(self) -> float:
        """Reward that new images get, on average, if they are distributed as the reference set."""
        return 0.0 if self.credit == "leave_one_in" else -self.weighted_distance

    @property
    def weighted_distance(self) -> float:
        """Weighted distance of the reference set from real data, which rewards are differences of."""
        return sum(self._weight(name) * distance.value for name, distance in self.distances.items())

    @property
    def removal_effects(self) -> Tensor:
        """Change of the weighted distance when one reference image is taken away, `(N,)`, float64."""
        if self._removal_effects is None:
            every = torch.arange(len(next(iter(self.features.values()))))
            parts = [self._weight(name) * distance.delete_one(every) for name, distance in self.distances.items()]
            self._removal_effects = torch.stack(parts).sum(dim=0)
        return self._removal_effects

    @property
    def _centres(self) -> Tensor:
        """Mean removal effect of each slot's group, `(N,)`."""
        effects = self.removal_effects
        if self.groups is None:
            return effects.mean().expand(len(effects))
        groups = self.groups.to(effects.device)
        sums = effects.new_zeros(int(groups.max()) + 1).index_add(0, groups, effects)
        return (sums / groups.bincount())[groups]

    def centre_by(self, members: Sequence[Tensor]) -> None:
        """Centres credits within groups of slots, such as classes, if their `members` are 4 or more on average."""
        self.groups = None
        if len(torch.cat(list(members))) >= 4 * len(members):
            self.groups = torch.empty(sum(map(len, members)), dtype=torch.long)
            for number, slots in enumerate(members):
                self.groups[slots] = number

    def _weight(self, name: str) -> float:
        return self.space_weights[name] / (self.first_distances[name] if len(self.distances) > 1 else 1.0)

    def reset(self) -> None:
        """Forgets the reference set and the units of the spaces: the next reference set is the first again."""
        self.features, self.first_distances, self._removal_effects = {}, {}, None

    def set_reference(self, features: Mapping[str, Tensor]) -> None:
        """Takes `features` `(N, d)` per space as the reference set."""
        self.features = {name: features[name].float() for name in self.extractors}
        self._removal_effects = None
        for name, distance in self.distances.items():
            distance.fit(self.features[name])
        if not self.first_distances:
            first = self.reference_distances
            if len(first) > 1 and not min(first.values()) > 0:
                remedy = "leave a space out, or use KernelDistance(..., unbiased=False), which is never below 0"
                raise ValueError(f"the first distances are {first}, but must be positive to divide by: {remedy}.")
            self.first_distances = first

    def update_reference(
        self, slots: Tensor, features: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> None:
        """Leaves new images in the `slots` they were judged in; of several in one, `generator` chooses."""
        flat, order = slots.flatten().tolist(), torch.randperm(slots.numel(), generator=generator).tolist()
        chosen = {flat[row]: row for row in reversed(order)}  # by slot, the first one in the random order
        updated = {}
        for name, reference in self.features.items():
            new = features[name][list(chosen.values())].to(reference)
            updated[name] = reference.index_copy(0, torch.tensor([*chosen], device=reference.device), new)
        self.set_reference(updated)

    # ---- reward ----

    def subset_rewards(self, slots: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Rewards `(B,)` of subsets (Eq. 4), float64, for slots `(B, n)` and new features `(B * n, d)` by space."""
        return self._total("replaced", slots, features)

    def score(self, slots: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Rewards with `credit` and `control_variate` applied: `(B,)` if shared, else `(B, n)`, float64."""
        places = slots.to(next(iter(features.values())).device)
        if self.credit == "leave_one_in":
            return self._total("leave_one_in", slots, features) - self._centres[places]
        rewards = self.subset_rewards(slots, features)
        if self.control_variate:
            rewards = rewards + (self.removal_effects - self._centres)[places].sum(dim=1)
        return rewards

    def gradient(self, slots: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient `(M, d)` per space of the weighted distance, with all distinct `slots` `(M,)` replaced at once."""
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
        self,
        images: Tensor,
        *,
        slots: Tensor,
        labels: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        **kwargs: object,
    ) -> list[float]:
        """One reward per uint8 image of `(B * n, C, H, W)`, as TRL's reward functions return, for `slots` `(B, n)`."""
        rewards = self.score(slots, self.extract(images, labels if prompts is None else prompts))
        if rewards.ndim == 1:  # shared by the images of a subset
            rewards = rewards.repeat_interleave(slots.shape[1])
        return rewards.flatten().tolist()

    # ---- checkpoints ----

    def state_dict(self) -> State:
        """The reference set's features and the first distances."""
        return {"features": dict(self.features), "first_distances": dict(self.first_distances)}

    def load_state_dict(self, state: State) -> None:
        """Restores a reference set of a reward with the same [`~SubsetReplaceReward.describe`]."""
        self.first_distances = dict(state["first_distances"])
        if state["features"]:
            self.set_reference(state["features"])

    def describe(self) -> State:
        """Describes settings and extractors, and real data by their distance from fixed features, to five digits."""
        about: State = {name: getattr(self, name) for name in ("credit", "control_variate", "space_weights")}
        for space, distance in self.distances.items():
            about[f"extractor.{space}"] = describe_extractor(self.extractors[space])
            if hasattr(distance, "dimension"):
                noise = torch.randn(64, distance.dimension, generator=torch.Generator().manual_seed(0))
                about[f"real_statistics.{space}"] = f"{copy.copy(distance).fit(noise).value:.5g} from fixed features"
        return about
