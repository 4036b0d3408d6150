# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
The paper's tables and figures as training runs of a small generator: which arms, on how many images, seen by what.

Sizes follow the paper's by ratio: 1,000 reference images for 5,000, subsets of 8 for 50, 256 new images an update, 10
steps in training and 50 at evaluation for its 50 and 250.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from trl_distreward import RECIPES

PAPER: dict[str, Any] = {**RECIPES["paper"], "replace_size": 8}
ROLLING: dict[str, Any] = RECIPES["policy_gradient"]
BACKPROP: dict[str, Any] = RECIPES["recommended"]
# Chosen on seed 100, which no other figure uses: python benchmarks/paper rates
RATES: dict[str, dict[str, float]] = {
    "digits": {"RL": 5e-5, "RS": 3e-6, "GRPO": 1e-4, "backprop": 1e-4},
    "mnist": {"RL": 2e-5, "RS": 3e-6, "GRPO": 2e-4, "backprop": 1e-4},
}


@dataclass(frozen=True)
class Arm:
    """
    One run: settings of the trainer, or several one after the other, each from where the last one ended.

    Args:
        kind (`str`): whose learning rate it takes, a key of `RATES`.
        settings (`dict`): fields of the configuration.
        reward (`dict`, *optional*): arguments of the reward.
        after (`Arm`, *optional*): an arm that trains first, on half of the images.
        sample_wise (`bool`, *optional*, defaults to `False`): whether there is a reward of single images beside.
        rate_factor (`float`, *optional*, defaults to 1.0): on that rate.
        rate (`float`, *optional*): another rate.
        noise_levels (`tuple[float, float]`, *optional*): levels of noise, the first and the last update's.
    """

    kind: str
    settings: dict[str, Any]
    reward: dict[str, Any] = field(default_factory=dict)
    after: "Arm | None" = None
    sample_wise: bool = False
    rate_factor: float = 1.0
    rate: float | None = None
    noise_levels: tuple[float, float] | None = None


@dataclass(frozen=True)
class Experiment:
    """
    Arms that are compared at equal images generated.

    Args:
        about (`str`): what is asked.
        arms (`dict[str, Arm]`): the arms by name.
        budget (`int`): images of a run, reference sets counted.
        evaluations (`tuple[int, ...]`, *optional*): evaluations after so many images.
        heldout (`bool`, *optional*, defaults to `False`): whether Table 4's metrics are computed.
        eval_steps (`tuple[int, ...]`, *optional*, defaults to `(20,)`): numbers of sampling steps at evaluation.
        eval_images (`int`, *optional*, defaults to 2000): images of an evaluation.
    """

    about: str
    arms: dict[str, Arm]
    budget: int
    evaluations: tuple[int, ...] = ()
    heldout: bool = False
    eval_steps: tuple[int, ...] = (20,)
    eval_images: int = 2000


def affordable_updates(settings: dict[str, Any], budget: int, images_per_update: int) -> int:
    """Updates, at least one, that `budget` images pay for, those of reference sets among them."""
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
    return Arm("RL", {**PAPER, **settings})


def kept(**settings: Any) -> Arm:
    """The paper's recipe on all subsets, not the best quarter, which learns too little here to compare anything."""
    return paper(top_advantage_quantile=1.0, **settings)


def rolling(reward: dict[str, Any] | None = None, **settings: Any) -> Arm:
    return Arm("GRPO", {**ROLLING, **settings}, reward or {})


RL = paper()
RS = Arm("RS", {**PAPER, "loss_type": "rft"})
SAMPLE_WISE = {**ROLLING, "multi_objective_aggregation": "normalize_then_sum"}

EXPERIMENTS: dict[str, Experiment] = {
    "training": Experiment(
        "Tables 1, 3, 4 and 6, Fig. 4b: rejection sampling, the paper's recipe and ours, over training",
        {
            "rejection sampling": RS,
            "paper": RL,
            "policy gradient": rolling(),
            "recommended": Arm("backprop", BACKPROP),
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
        "Fig. 3a, at equal updates in the place of equal images",
        {
            f"N = {size}": kept(reference_set_size=size, max_steps=31)  # those of N = 1000 above
            for size in (500, 1000, 1500, 2000)
        },
        budget=16_000,
    ),
    "subset_size": Experiment(
        "Fig. 3b: images of a subset, 256 in all",
        {f"n = {size}": kept(replace_size=size) for size in (1, 2, 4, 8, 16, 32)},
        budget=12_000,
    ),
    "selection": Experiment(
        "Fig. 3c: which subsets are trained on",
        {
            "top 25%": RL,
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
            "rejection sampling": RS,
            "policy gradient": kept(),
            "policy gradient after rejection sampling": replace(kept(), after=RS),
        },
        budget=12_000,
    ),
    "rejection": Experiment(
        "Why rejection sampling harms here: its selection, or the samples it learns from",
        {
            "rejection sampling": RS,
            "all kept": Arm("RS", {**RS.settings, "top_advantage_quantile": 1.0}),
            "50 steps": Arm("RS", {**RS.settings, "num_inference_steps": 50}),
            "50 steps, all kept": Arm("RS", {**RS.settings, "num_inference_steps": 50, "top_advantage_quantile": 1.0}),
        },
        budget=8_000,
        eval_steps=(50,),
    ),
    "refresh": Experiment(
        "Fig. 5: updates between two generations of the reference set",
        {
            **{f"every {steps}": kept(reference_refresh_steps=steps) for steps in (5, 10, 20)},
            **{f"auto, drift {d:g}": kept(reference_refresh_steps="auto", refresh_drift=d) for d in (0.5, 1, 2)},
            "rolling": kept(reference_update="rolling"),
        },
        budget=12_000,
    ),
    "sample_wise": Experiment(
        "Fig. 1: a reward of single images, alone and beside the distance",
        {
            f"{name}{'' if factor == 1 else f', rate × {factor:g}'}": Arm(
                "GRPO", {**SAMPLE_WISE, "reward_weights": weights}, sample_wise=True, rate_factor=factor
            )
            for factor in (1.0, 3.0)
            for name, weights in (("sample-wise", [0.0, 1.0]), ("distribution", [1.0, 0.0]), ("both", [1.0, 0.5]))
        },
        budget=9_000,
        heldout=True,
    ),
    "noise": Experiment(
        "The SDE-ODE gap: noise in training by what the ODE gains",
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
            "back-propagation, SDE": Arm("backprop", {**BACKPROP, "sampler": "sde"}),
            "back-propagation, ODE": Arm("backprop", BACKPROP),
        },
        budget=7_000,
    ),
    "recipe": Experiment(
        "A better recipe: each part alone on the paper's, and the recommended without it",
        {
            "paper": RL,
            "+ all subsets": paper(top_advantage_quantile=1.0),
            "+ one image a subset": paper(replace_size=1),
            "+ leave-one-in credit": Arm("RL", PAPER, {"credit": "leave_one_in"}),
            "+ control variate": Arm("RL", PAPER, {"control_variate": True}),
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
            "recommended": Arm("backprop", BACKPROP),
            "recommended, last step": Arm("backprop", {**BACKPROP, "backprop_steps": 1}),
            "recommended, all steps": Arm("backprop", {**BACKPROP, "backprop_steps": 10}),
            "recommended, not averaged": Arm("backprop", {**BACKPROP, "ema_decay": 0.0}),
        },
        budget=7_000,
    ),
}
