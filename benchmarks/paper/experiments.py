# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The paper's tables and figures, and some of this library's, as training runs of a small generator.

Sizes keep the paper's ratios: 1,000 reference images for 5,000, subsets of 8 for 50, 10 steps in training and 50 at
evaluation for its 50 and 250; 256 new images an update.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import trl_distreward

_SHARED = ("loss_type", "sampler", "reference_update", "top_advantage_quantile", "lr_scheduler_type", "ema_decay")
PAPER: dict[str, Any] = {**{name: trl_distreward.PAPER[name] for name in _SHARED}, "replace_size": 8}
POLICY_GRADIENT: dict[str, Any] = {
    **{"loss_type": "grpo", "sampler": "sde"},
    **{"reference_update": "rolling", "lr_scheduler_type": "linear", "replace_size": 1},
}
BACKPROP: dict[str, Any] = {**POLICY_GRADIENT, "loss_type": "backprop", "sampler": "ode", "backprop_from": 0.3}
FORWARD: dict[str, Any] = {**POLICY_GRADIENT, "sampler": "ode"}
# Chosen on a seed that nothing else uses: python benchmarks/paper rates --seeds 100
RATES: dict[str, dict[str, float]] = {
    "digits": {"paper": 5e-5, "rejection": 3e-6, "gradient": 1e-4, "backprop": 1e-4},
    "mnist": {"paper": 2e-5, "rejection": 3e-6, "gradient": 2e-4, "backprop": 1e-4},
}


@dataclass(frozen=True)
class Arm:
    """One run."""

    kind: str  # key of its learning rate in RATES
    settings: dict[str, Any]  # fields of the configuration
    reward: dict[str, Any] = field(default_factory=dict)  # arguments of the reward
    after: "Arm | None" = None  # trains first, on half of the images
    sample_wise: bool = False  # adds a reward of single images
    rate_factor: float = 1.0  # of the learning rate
    rate: float | None = None  # instead of the learning rate of its kind
    noise_levels: tuple[float, float] | None = None  # at the first and the last update
    budget: int | None = None  # images, instead of the experiment's


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared."""

    about: str
    arms: dict[str, Arm]
    budget: int  # generated images of a run, reference sets included
    evaluations: tuple[int, ...] = ()  # after these numbers of images
    heldout: bool = False  # computes the metrics of Table 4
    memory: bool = False  # measures what autograd holds for the backward pass
    eval_steps: tuple[int, ...] = (20,)
    eval_samplers: tuple[str, ...] = ("sde", "ode")
    eval_images: int = 2000
    keep: bool = False  # writes the trained generators, for pictures and other judges


def affordable_updates(settings: dict[str, Any], budget: int, images_per_update: int) -> int:
    """Number of updates, at least one, that `budget` images pay for, reference sets included."""
    size, every = settings.get("reference_set_size", 1000), settings.get("reference_refresh_steps", 10)
    refreshed = settings["reference_update"] == "refresh"
    updates = images = 0
    while True:
        due = updates == 0 or (refreshed and updates % every == 0)
        images += images_per_update + due * size
        if images > budget:
            return max(1, updates)
        updates += 1


def paper(**settings: Any) -> Arm:
    return Arm("paper", {**PAPER, **settings})


def kept(**settings: Any) -> Arm:
    """The paper's settings with all subsets: its best quarter learns too little here to compare anything."""
    return paper(top_advantage_quantile=1.0, **settings)


def rejection(**settings: Any) -> Arm:
    return Arm("rejection", {**PAPER, "loss_type": "rft", **settings})


def rolling(reward: dict[str, Any] | None = None, **settings: Any) -> Arm:
    return Arm("gradient", {**POLICY_GRADIENT, **settings}, reward or {})


def backprop(**settings: Any) -> Arm:
    return Arm("backprop", {**BACKPROP, **settings})


ONE_STEP = {"num_inference_steps": 1, "backprop_from": 1.0}

TRIED = {
    "paper": (PAPER, [2e-5, 5e-5, 1e-4]),
    "rejection": (rejection().settings, [1e-6, 3e-6, 1e-5]),
    "gradient": (POLICY_GRADIENT, [5e-5, 1e-4, 2e-4]),
    "backprop": (BACKPROP, [1e-4, 2e-4, 4e-4]),
}

EXPERIMENTS: dict[str, Experiment] = {
    "rates": Experiment(
        "Learning rates",
        {f"{kind}, {r:g}": Arm(kind, settings, rate=r) for kind, (settings, rates) in TRIED.items() for r in rates},
        budget=8_000,
    ),
    "training": Experiment(
        "Tables 1, 3, 4 and 6, Fig. 4b: rejection sampling, the paper's settings and this library's, over training",
        {
            "rejection sampling": rejection(),
            "paper": paper(),
            "policy gradient": rolling(),
            "back-propagation": backprop(),
        },
        budget=16_000,
        evaluations=(2_000, 4_000, 8_000, 12_000),
        heldout=True,
        eval_steps=(10, 50),
        eval_images=1000,
    ),
    "reference_size": Experiment(
        "Fig. 3a: images of the reference set",
        {f"N = {size}": kept(reference_set_size=size) for size in (500, 1000, 1500, 2000)},
        budget=12_000,
    ),
    "reference_updates": Experiment(
        "Fig. 3a at equal updates instead of equal images",
        {f"N = {size}": kept(reference_set_size=size, max_steps=31) for size in (500, 1000, 1500, 2000)},
        budget=16_000,
    ),
    "subset_size": Experiment(
        "Fig. 3b: images of a subset, 256 in an update",
        {f"n = {size}": kept(replace_size=size) for size in (1, 2, 4, 8, 16, 32)},
        budget=12_000,
    ),
    "selection": Experiment(
        "Fig. 3c: which subsets are trained on",
        {
            "top 25%": paper(),
            "top 50%": paper(top_advantage_quantile=0.5),
            "top and bottom 25%": paper(selection="top_bottom"),
            "all": kept(),
        },
        budget=12_000,
    ),
    "normalization": Experiment(
        "Fig. 4a: what advantages are normalized over",
        {
            "batch": kept(),
            "group of 4": kept(advantage_normalization="group", num_generations=4),
            "batch, same slots by 4": kept(num_generations=4),
        },
        budget=12_000,
    ),
    "stages": Experiment(
        "Fig. 4c: policy gradients after rejection sampling",
        {
            "rejection sampling": rejection(),
            "policy gradient": kept(),
            "policy gradient after rejection sampling": replace(kept(), after=rejection()),
        },
        budget=12_000,
    ),
    "rejection": Experiment(
        "Why rejection sampling harms here: its selection, or the samples it learns from",
        {
            "rejection sampling": rejection(),
            "all kept": rejection(top_advantage_quantile=1.0),
            "50 steps": rejection(num_inference_steps=50),
            "50 steps, all kept": rejection(num_inference_steps=50, top_advantage_quantile=1.0),
        },
        budget=8_000,
        eval_steps=(50,),
    ),
    "refresh": Experiment(
        "Fig. 5: updates between two refreshes of the reference set",
        {
            **{f"every {steps}": kept(reference_refresh_steps=steps) for steps in (5, 10, 20)},
            **{f"auto, drift {d:g}": kept(reference_refresh_steps="auto", refresh_drift=d) for d in (0.5, 1, 2)},
            "rolling": kept(reference_update="rolling"),
        },
        budget=12_000,
    ),
    "sample_wise": Experiment(
        "Fig. 1: a reward of single images, alone and with the distance",
        {
            f"{name}{'' if factor == 1 else f', rate × {factor:g}'}": Arm(
                "gradient", {**POLICY_GRADIENT, "reward_weights": weights}, sample_wise=True, rate_factor=factor
            )
            for factor in (1.0, 3.0)
            for name, weights in (("sample-wise", [0.0, 1.0]), ("distribution", [1.0, 0.0]), ("both", [1.0, 0.5]))
        },
        budget=9_000,
        heldout=True,
    ),
    "noise": Experiment(
        "The gap between SDE and ODE: gain of the ODE by the noise in training",
        {
            "sit": rolling(),
            "sit, level 0.35": rolling(noise_level=0.35),
            "sit, level falling from 1.2 to 0.2": replace(rolling(), noise_levels=(1.2, 0.2)),
            "flow_grpo": rolling(noise_schedule="flow_grpo"),
            "dance": rolling(noise_schedule="dance", last_step_size=0.04),
            "cps": rolling(noise_schedule="cps"),
            "sit, first 4 steps": rolling(sde_window_size=4, sde_window_interval=1000),
            "sit, sliding window of 4": rolling(sde_window_size=4, sde_window_interval=3),
            "sit, random window of 2": rolling(sde_window_size=2, sde_window="random"),
            "sit, 5 steps": rolling(num_inference_steps=5),
            "back-propagation, SDE": backprop(sampler="sde"),
            "back-propagation, ODE": backprop(),
        },
        budget=7_000,
    ),
    "parts": Experiment(
        "Each part of this library's settings added to the paper's alone, or left out",
        {
            "paper": paper(),
            "+ all subsets": paper(top_advantage_quantile=1.0),
            "+ one image a subset": paper(replace_size=1),
            "+ leave-one-in credit": Arm("paper", PAPER, {"credit": "leave_one_in"}),
            "+ control variate": Arm("paper", PAPER, {"control_variate": True}),
            "+ rolling set": paper(reference_update="rolling"),
            "+ automatic refresh": paper(reference_refresh_steps="auto"),
            "+ averaged weights": paper(ema_decay=0.9),
            "+ falling rate": paper(lr_scheduler_type="linear"),
            "+ KL": paper(beta=0.01),
            "policy gradient": rolling(),
            "policy gradient, top 25%": rolling(top_advantage_quantile=0.25),
            "policy gradient, n = 8": rolling(replace_size=8),
            "policy gradient, refreshed": rolling(reference_update="refresh"),
            "policy gradient, not averaged": rolling(ema_decay=0.0),
            "policy gradient, constant rate": rolling(lr_scheduler_type="constant"),
            "policy gradient, control variate": rolling({"control_variate": True}),
            "policy gradient, one space": rolling({"space_weights": {"middle": 0, "pixels": 0, "asked": 0}}),
            "back-propagation": backprop(),
            "back-propagation, last step": backprop(backprop_from=0.1),
            "back-propagation, all steps": backprop(backprop_from=1.0),
            "back-propagation, not averaged": backprop(ema_decay=0.0),
        },
        budget=7_000,
    ),
    "forward_process": Experiment(
        "Transport and DiffusionNFT, at half and twice the learning rate",
        {
            f"{name}, {rate:g}": Arm("gradient", {**FORWARD, **settings}, rate=rate)
            for name, settings in {
                "transport": {"loss_type": "transport", "transport_advantage": 0.0},
                "transport and half the pull": {"loss_type": "transport", "transport_advantage": 0.5},
                "DiffusionNFT": {"loss_type": "nft"},
            }.items()
            for rate in (1.5e-4, 3e-4, 6e-4)
        }
        | {
            "transport and half the pull, 0.0003, 60 updates": Arm(
                "gradient", {**FORWARD, "loss_type": "transport", "transport_advantage": 0.5}, rate=3e-4, budget=16_400
            )
        },
        budget=7_000,
    ),
    "colour": Experiment(
        "The same on a colour model, under the ODE alone",
        {
            f"{name}, {rate:g}": Arm(
                "gradient", {**FORWARD, "loss_type": "transport", "transport_advantage": advantage}, rate=rate
            )
            for name, advantage in (
                ("transport", 0.0),
                ("transport and half the pull", 0.5),
                ("transport and the pull", 1.0),
            )
            for rate in (1e-4, 2e-4, 5e-5)
        },
        budget=8_000,
        eval_samplers=("ode",),
        keep=True,
    ),
    "estimators": Experiment(
        "Policy gradients, rejection sampling and back-propagation through some or all steps",
        {
            "paper": paper(),
            "policy gradient": rolling(),
            "rejection sampling": replace(rolling(loss_type="rft", top_advantage_quantile=0.25), rate=1e-4),
            **{
                f"back-propagation, {name}, {sampler.upper()}": backprop(sampler=sampler, backprop_from=start)
                for sampler in ("sde", "ode")
                for name, start in (("last step", 0.1), ("last 3", 0.3), ("all 10", 1.0))
            },
        },
        budget=7_140,
        memory=True,
    ),
    "one_step": Experiment(
        "Many steps or one: training the generator as it is sampled, or as a generator of one step",
        {
            "policy gradient, 10 steps": rolling(),
            "back-propagation, last 3 of 10 steps": backprop(),
            "back-propagation, 1 step, as many images": backprop(**ONE_STEP),
            # as many network evaluations as the policy gradient
            "back-propagation, 1 step, ten times the images": replace(backprop(**ONE_STEP), budget=60_000),
        },
        budget=7_000,
        eval_steps=(20, 1),
        eval_samplers=("ode",),
    ),
}
