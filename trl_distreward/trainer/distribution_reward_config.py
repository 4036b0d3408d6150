# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field
from typing import Any

from ..generation import SamplingSchedule
from ..policies import DiffusionPolicy
from ..sampling import ODE_SOLVERS
from .base_config import DiffusionTrainerConfig
from .objective import ADVANTAGE_NORMALIZATIONS, SELECTIONS
from .recipes import RECIPES, fill_in, recipe_field, with_values

REFERENCE_UPDATES = ("refresh", "rolling")
LOSS_TYPES = ("grpo", "rft", "backprop")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
# Fields with a fixed set of values
_CHOICES = {
    "reference_update": REFERENCE_UPDATES,
    "loss_type": LOSS_TYPES,
    "advantage_normalization": ADVANTAGE_NORMALIZATIONS,
    "selection": SELECTIONS,
    "selection_scope": ("global", "local"),
    "multi_objective_aggregation": AGGREGATIONS,
    "sde_window": ("sliding", "random"),
    "step_weighting": ("uniform", "noise"),
}
# Fields of other loss types
_BACKPROP_ONLY = ("backprop_steps", "backprop_draws", "checkpoint_steps")
_RATIO_ONLY = ("timestep_fraction", "step_weighting", "ratio_normalization", "epsilon", "log_steps")
_SUBSETS_ONLY = (
    "advantage_normalization",
    "selection",
    "selection_scope",
    "top_advantage_quantile",
    "multi_objective_aggregation",
    "num_generations",
    "num_iterations",
    "best_of_n",
    "log_rewards",
    "log_reward_diagnostics",
)
_UNUSED = {
    "grpo": _BACKPROP_ONLY,
    "rft": (*_BACKPROP_ONLY, *_RATIO_ONLY),
    "backprop": (*_RATIO_ONLY, *_SUBSETS_ONLY),
}


@dataclass
class DiffusionDistributionConfig(DiffusionTrainerConfig):
    r"""
    Configuration of the [`DistributionRewardTrainer`].

    Besides the parameters below it takes those of [`DiffusionTrainerConfig`]: `reference_set_size`, `stratify_by`,
    `reward_weights`, `noise_schedule`, `noise_level`, `last_step_size`, `time_grid`, `time_shift`, `guidance_scale`,
    `guidance_channels`, `decode_batch_size`, `max_skipped_updates`, `num_eval_images` and `eval_seed`; and all of
    [`~transformers.TrainingArguments`]. Defaults are those of the paper
    ([arXiv 2607.02291](https://huggingface.co/papers/2607.02291)), Section 4.1, where it gives them, unless `recipe`
    is another.

    Parameters:
        recipe (`str`, *optional*, defaults to `"paper"`):
            The settings that `trl_distreward.RECIPES` has under this name. Whatever is given besides wins; a field of
            a recipe left `None` has its value once the configuration is made. `"paper"`; `"recommended"`: the gradient
            of the distance itself, which every reward must have; `"policy_gradient"`: the same settings for rewards
            of any kind.

        > Parameters that control the reward

        num_subsets (`int`, *optional*, defaults to the recipe's):
            Subsets B generated and judged per update, over all processes; a multiple of their number.
        replace_size (`int`, *optional*, defaults to the recipe's):
            Images n of a subset. 1 gives each image a reward of its own.
        reference_update (`str`, *optional*, defaults to the recipe's):
            `"refresh"`: the reference set is generated anew every `reference_refresh_steps`, as in the paper.
            `"rolling"`: new images stay in the places they were judged in, and nothing is generated twice; slots are
            then drawn without replacement over the whole batch.
        reference_refresh_steps (`int` or `str`, *optional*, defaults to `10`):
            Optimizer steps between two generations of the reference set under `"refresh"`. `"auto"`: it is generated
            anew once the mean reward has drifted from what the unchanged set would get by more than `refresh_drift`.
        refresh_drift (`float`, *optional*, defaults to `0.5`):
            Drift under `"auto"`, in standard deviations of the rewards of one update.
        best_of_n (`int`, *optional*, defaults to `1`):
            Candidates generated for every slot, of which the one with the best replaced distance by itself is kept
            before subsets are judged (Appendix C).
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            Whether several rewards are summed before advantages are normalized, or each is normalized first.

        > Parameters that control generation

        sampler (`str`, *optional*, defaults to the recipe's):
            Sampler of the rollouts. A policy gradient needs `"sde"`: the ODE's steps have no density. `"ode"`, by
            Euler's method, is for `loss_type="backprop"`.
        num_inference_steps (`int`, *optional*, defaults to `50`):
            Steps of the rollouts and of the reference set.
        sde_window_size (`int`, *optional*):
            Steps with noise; the others follow the ODE and are not trained. All steps by default. 1 or 2 with
            `sde_window="random"` is Flow-GRPO-Fast.
        sde_window (`str`, *optional*, defaults to `"sliding"`):
            `"sliding"`: the window moves from noise to data by one step every `sde_window_interval` generations, then
            starts again (MixGRPO, arXiv 2507.21802). `"random"`: drawn anew at each generation.
        sde_window_interval (`int`, *optional*, defaults to `25`):
            Generations between two moves of the sliding window.
        rollout_batch_size (`int`, *optional*):
            Images at a time per process in rollouts; `per_device_train_batch_size` by default.

        > Parameters that control the update

        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            (Image, step) pairs in one forward-backward pass. It changes memory and speed, not the update.
        loss_type (`str`, *optional*, defaults to the recipe's):
            `"grpo"`: the clipped policy gradient (Eq. 6). `"rft"`: rejection sampling, the flow-matching loss (Eq. 2)
            on the selected images, whatever their advantages. `"backprop"`: the gradient of the distance itself,
            through the last `backprop_steps` of sampling; all images of an update replace their slots at once.
        backprop_steps (`int` or `str`, *optional*, defaults to the recipe's):
            Last steps that gradients go back through, under the SDE or the ODE. `"random"`: drawn anew at each update
            from 1 to all (AlignProp, arXiv 2310.03739). Memory grows with it, unless `checkpoint_steps`.
        backprop_draws (`int`, *optional*, defaults to `1`):
            With `backprop_steps=1`, gradients of so many last steps from fresh noise are averaged (DRaFT-LV,
            arXiv 2309.17400).
        checkpoint_steps (`bool`, *optional*, defaults to `False`):
            Recomputes each step's activations in the backward pass of `"backprop"`.
        advantage_normalization (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: mean and standard deviation over all subsets of all processes (Eq. 5); `"group"`: over the
            `num_generations` subsets that replace the same slots; `"none"`: about the mean, not divided.
        num_generations (`int`, *optional*, defaults to `1`):
            Subsets that replace the same slots.
        selection (`str`, *optional*, defaults to `"top"`):
            Subsets that are trained on: `"top"`, the share `top_advantage_quantile` with the highest advantage;
            `"top_bottom"`, that share from either end; `"all"`.
        selection_scope (`str`, *optional*, defaults to `"global"`):
            Whether the share is taken over all processes or in each.
        top_advantage_quantile (`float`, *optional*, defaults to the recipe's):
            Share that is selected; 1.0 keeps all.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the steps with noise that is trained, drawn anew at each generation.
        step_weighting (`str`, *optional*, defaults to `"uniform"`):
            `"noise"` weights steps by their noise's standard deviation (TempFlow-GRPO, arXiv 2508.04324).
        ratio_normalization (`bool`, *optional*, defaults to `False`):
            Puts the log-ratios of all steps on one scale (GRPO-Guard, arXiv 2510.22319).
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the probability ratio, with log-probabilities averaged over dimensions.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the initial model; 0 loads no reference model. Under `"backprop"`, of the
            mean squared difference of the two velocities instead.
        num_iterations (`int`, *optional*, defaults to `1`):
            Updates made from each generation. 1 is strictly on-policy: the ratio is then exactly 1.
        ema_decay (`float`, *optional*, defaults to the recipe's):
            Decay of a moving average of the weights, which is then what is evaluated and saved as the pipeline.
        offload_trajectories (`bool`, *optional*, defaults to `False`):
            Keeps the rollout's states in CPU memory until they are trained on.
        log_rewards (`bool`, *optional*, defaults to `False`):
            Prints a table of the best and worst subsets at every log.
        log_reward_diagnostics (`bool`, *optional*, defaults to `False`):
            Logs at every generation how much of the rewards' spread is the images' doing, see
            [`~rewards.reward_diagnostics`]. At a generation whose reference set is new these are a placebo's.
        log_steps (`bool`, *optional*, defaults to `False`):
            Logs |Δ log p| between rollout and replay for every trained step, not only their mean.

        > Parameters that control evaluation

        num_inference_steps_eval (`int` or `list[int]`, *optional*, defaults to `[250]`):
            Steps at evaluation. Several are evaluated one after the other, and their names tell them apart:
            `eval_sde_50_…`, `eval_sde_250_…`. The paper's gains depend on them (Table 3).
        eval_samplers (`list[str]`, *optional*, defaults to `["sde", "ode"]`):
            Samplers evaluated; the SDE has the noise of training.
        eval_solver (`str`, *optional*, defaults to `"euler"`):
            `"euler"`, `"heun"`, `"heun2"`, `"dopri5"`, or on the grid `"karras"` EDM's `"heun_sigma"`, see
            [`~sampling.solve_ode`]. `"dopri5"` chooses its steps itself: the ODE is then evaluated once, whatever
            `num_inference_steps_eval`.

    > Parameters with other defaults than [`~transformers.TrainingArguments`], besides those that
    > [`DiffusionTrainerConfig`] names: `learning_rate=1e-5`, `max_steps=450`, `save_steps=50`,
    > `ddp_find_unused_parameters=False`, and the recipe's `lr_scheduler_type`.
    """

    recipe: str = field(
        default="paper",
        metadata={"help": "Settings for what is not given besides.", "choices": list(RECIPES)},
    )
    lr_scheduler_type: str = recipe_field("lr_scheduler_type", "Learning rate schedule.")
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate; 1e-5 in the paper."})
    max_steps: int = field(
        default=450,
        metadata={"help": "Optimizer steps. If not positive, num_train_epochs passes over the reference set's slots."},
    )
    save_steps: float = field(default=50, metadata={"help": "Optimizer steps between two checkpoints."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for unused parameters."}
    )

    # Parameters that control the reward
    num_subsets: int = recipe_field("num_subsets", "Subsets judged per update, over all processes.")
    replace_size: int = recipe_field("replace_size", "Images of a subset.")
    reference_update: str = recipe_field(
        "reference_update", "How the reference set follows the policy.", choices=list(REFERENCE_UPDATES)
    )
    reference_refresh_steps: str = field(  # a number after __post_init__; the command line knows one type
        default="10", metadata={"help": "Optimizer steps between two generations of the reference set, or 'auto'."}
    )
    refresh_drift: float = field(
        default=0.5, metadata={"help": "Drift that brings a refresh under 'auto', in standard deviations."}
    )
    best_of_n: int = field(default=1, metadata={"help": "Candidates generated for every slot; the best is kept."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "How several rewards become one advantage.", "choices": list(AGGREGATIONS)},
    )

    # Parameters that control generation
    sampler: str = recipe_field("sampler", "Sampler of the rollouts.", choices=["sde", "ode"])
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the rollouts and of the reference set."})
    sde_window_size: int | None = field(default=None, metadata={"help": "Steps with noise; None: all."})
    sde_window: str = field(
        default="sliding", metadata={"help": "How the window of noise moves.", "choices": ["sliding", "random"]}
    )
    sde_window_interval: int = field(default=25, metadata={"help": "Generations between two moves of the window."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Images at a time per process in rollouts."}
    )

    # Parameters that control the update
    loss_type: str = recipe_field(
        "loss_type", "Policy gradient, rejection sampling or back-propagation.", choices=list(LOSS_TYPES)
    )
    backprop_steps: str = recipe_field(  # likewise
        "backprop_steps", "Last steps that gradients go back through, or 'random'."
    )
    backprop_draws: int = field(
        default=1, metadata={"help": "Draws of the last step that gradients are averaged over."}
    )
    checkpoint_steps: bool = field(
        default=False, metadata={"help": "Recomputes activations of back-propagated steps."}
    )
    advantage_normalization: str = field(
        default="batch",
        metadata={"help": "Over what advantages are normalized.", "choices": list(ADVANTAGE_NORMALIZATIONS)},
    )
    num_generations: int = field(default=1, metadata={"help": "Subsets that replace the same slots."})
    selection: str = field(
        default="top", metadata={"help": "Which subsets are trained on.", "choices": list(SELECTIONS)}
    )
    selection_scope: str = field(
        default="global",
        metadata={"help": "Over what the selected share is taken.", "choices": ["global", "local"]},
    )
    top_advantage_quantile: float = recipe_field(
        "top_advantage_quantile", "Share of the subsets, by advantage, that is trained on."
    )
    timestep_fraction: float = field(default=1.0, metadata={"help": "Share of the steps with noise that is trained."})
    step_weighting: str = field(
        default="uniform", metadata={"help": "How steps are weighted.", "choices": ["uniform", "noise"]}
    )
    ratio_normalization: bool = field(
        default=False, metadata={"help": "Puts the log-ratios of all steps on one scale."}
    )
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the probability ratio."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the initial model."})
    num_iterations: int = field(default=1, metadata={"help": "Updates made from each generation."})
    ema_decay: float = recipe_field("ema_decay", "Decay of a moving average of the weights; 0 is none.")
    offload_trajectories: bool = field(
        default=False, metadata={"help": "Keeps the rollout's states in CPU memory until they are trained on."}
    )
    log_rewards: bool = field(default=False, metadata={"help": "Prints a table of subsets' rewards at every log."})
    log_reward_diagnostics: bool = field(
        default=False, metadata={"help": "Logs how much of the rewards' spread is the images' doing."}
    )
    log_steps: bool = field(default=False, metadata={"help": "Logs the change of log p for every trained step."})
    # Parameters that control evaluation
    num_inference_steps_eval: list[int] = field(
        default_factory=lambda: [250], metadata={"help": "Steps at evaluation; several are evaluated in turn."}
    )
    eval_samplers: list[str] = field(
        default_factory=lambda: ["sde", "ode"], metadata={"help": "Samplers that are evaluated."}
    )
    eval_solver: str = field(
        default="euler", metadata={"help": "Solver of the evaluated ODE.", "choices": list(ODE_SOLVERS)}
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices({"recipe": tuple(RECIPES)})
        fill_in(self)
        self._check_choices(_CHOICES)
        self._check_reward()
        self._check_update()
        self._set_schedules(*self._schedules())
        if self.time_grid != "auto":
            self._check_steps()
        super().__post_init__()

    def bind(self, policy: DiffusionPolicy) -> None:
        """Gives the schedules the times of `policy` where `time_grid="auto"`."""
        super().bind(policy)
        self._check_steps()

    def _check_steps(self) -> None:
        for name, schedule in self.eval_schedules.items():
            try:
                len(schedule.times)
            except ValueError as error:
                raise ValueError(f"evaluation under {name!r}: {error}") from error
        steps = len(self.rollout_schedule.trainable_steps)
        if not steps and self.sampler == "sde":
            raise ValueError(
                f"noise_level={self.noise_level} with num_inference_steps={self.num_inference_steps} leaves no step "
                "with noise, so nothing can be trained: raise either."
            )
        if self.sampler == "sde" and self.sde_window_size is not None and not 1 <= self.sde_window_size <= steps:
            raise ValueError(
                f"sde_window_size={self.sde_window_size} must lie in 1 to {steps}, the number of steps with noise."
            )

    def _check_reward(self) -> None:
        if self.reference_refresh_steps == "auto" and self.reference_update == "refresh" and self.best_of_n > 1:
            raise ValueError(
                f"best_of_n={self.best_of_n} with reference_refresh_steps='auto': images that were chosen are better "
                "than the reference set without any drift of the policy; use a number of steps, or "
                "reference_update='rolling'."
            )
        if self.reference_refresh_steps != "auto":
            try:
                setattr(self, "reference_refresh_steps", int(self.reference_refresh_steps))  # noqa: B010
            except ValueError:
                raise ValueError(
                    f"reference_refresh_steps={self.reference_refresh_steps!r} must be a number of steps or 'auto'."
                ) from None
        counts = ["reference_set_size", "replace_size", "num_iterations", "best_of_n", "sde_window_interval"]
        if self.reference_refresh_steps != "auto":
            counts.append("reference_refresh_steps")
        self._check_counts((*counts, "rollout_batch_size"))
        if self.replace_size >= self.reference_set_size:
            raise ValueError(
                f"replace_size={self.replace_size} is not smaller than reference_set_size={self.reference_set_size}: "
                "a subset must leave most of the reference set in place; lower replace_size or raise "
                "reference_set_size."
            )
        if self.num_subsets < 2:
            raise ValueError(f"num_subsets={self.num_subsets}: at least 2 subsets are needed to compare rewards.")
        if self.refresh_drift <= 0:
            raise ValueError(f"refresh_drift={self.refresh_drift} must be positive.")

    def _check_update(self) -> None:
        if self.num_generations < 1 or self.num_subsets % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide num_subsets={self.num_subsets}: it is how many "
                "subsets replace the same slots."
            )
        if self.advantage_normalization == "group" and self.num_generations < 2:
            raise ValueError(
                "advantage_normalization='group' compares subsets that replace the same slots: set num_generations "
                "to 2 or more."
            )
        for name in ("top_advantage_quantile", "timestep_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]; 1.0 keeps everything.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1); 0 keeps no average.")
        if self.epsilon <= 0 or self.beta < 0:
            raise ValueError(f"epsilon={self.epsilon} must be positive and beta={self.beta} not negative.")
        if self.loss_type == "rft" and (self.num_iterations > 1 or self.ratio_normalization or self.beta > 0):
            raise ValueError(
                "loss_type='rft' has no probability ratio and no KL: leave num_iterations=1, "
                "ratio_normalization=False and beta=0.0."
            )
        self._check_backprop_steps()
        if self.loss_type == "backprop":
            self._check_backprop()
        # a share of 1.0 says what is done anyway
        moot = {"top_advantage_quantile"} if self.top_advantage_quantile == 1.0 else set()
        unused = [name for name in _UNUSED[self.loss_type] if name not in moot]
        self._refuse_ignored(unused, f"loss_type={self.loss_type!r}", "choose another loss_type")
        self._check_idle()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} must be 1: every update already "
                "accumulates over all kept (image, step) pairs, per_device_train_batch_size at a time."
            )

    def _check_idle(self) -> None:
        """That options of an option are given where it is."""
        if self.sde_window_size is None:
            self._refuse_ignored(("sde_window", "sde_window_interval"), "sde_window_size=None", "give a size")
        elif self.sde_window == "random":
            self._refuse_ignored(("sde_window_interval",), "sde_window='random'", "let the window slide")
        if self.sde_window_size == 1:
            self._refuse_ignored(("step_weighting",), "sde_window_size=1", "widen the window")
        if self.reference_update == "rolling":
            refresh = ("reference_refresh_steps", "refresh_drift")
            self._refuse_ignored(refresh, "reference_update='rolling'", "set reference_update='refresh'")
        elif self.reference_refresh_steps != "auto":
            remedy = "set reference_refresh_steps='auto'"
            self._refuse_ignored(("refresh_drift",), f"reference_refresh_steps={self.reference_refresh_steps}", remedy)
        if "ode" not in self.eval_samplers:
            self._refuse_ignored(("eval_solver",), f"eval_samplers={self.eval_samplers}", "add 'ode' to them")

    def _check_backprop_steps(self) -> None:
        if self.backprop_steps != "random":
            try:
                steps = int(self.backprop_steps)
                setattr(self, "backprop_steps", steps)  # noqa: B010
            except ValueError:
                raise ValueError(
                    f"backprop_steps={self.backprop_steps!r} must be a number of steps or 'random'."
                ) from None
            if self.loss_type == "backprop" and not 1 <= steps <= self.num_inference_steps:
                raise ValueError(
                    f"backprop_steps={self.backprop_steps} must lie in 1 to num_inference_steps="
                    f"{self.num_inference_steps}."
                )
        if self.backprop_draws < 1 or (self.backprop_draws > 1 and str(self.backprop_steps) != "1"):
            raise ValueError(
                f"backprop_draws={self.backprop_draws} takes the last step several times: set backprop_steps=1, or "
                "backprop_draws=1."
            )

    def _check_backprop(self) -> None:
        if self.sampler == "ode" and self.sde_window_size is not None:
            raise ValueError(
                f"sde_window_size={self.sde_window_size}: sampler='ode' has no steps with noise; leave it None."
            )
        images = self.num_subsets * self.replace_size
        if images >= self.reference_set_size:
            raise ValueError(
                f"num_subsets * replace_size = {images} images are not fewer than reference_set_size="
                f"{self.reference_set_size}: under loss_type='backprop' they replace their slots all at once; lower "
                "num_subsets or raise reference_set_size."
            )
        if self.reference_refresh_steps == "auto" and self.reference_update == "refresh":
            raise ValueError(
                "reference_refresh_steps='auto' measures drift in the spread over subsets, which loss_type='backprop' "
                "has not: use reference_update='rolling' or a number of steps."
            )

    def _default(self, name: str) -> Any:
        return RECIPES[self.recipe].get(name, super()._default(name))

    def _schedules(self) -> tuple[SamplingSchedule, dict[str, SamplingSchedule]]:
        if self.sampler == "ode" and self.loss_type != "backprop":
            raise ValueError(
                "sampler='ode': a policy gradient needs the density of each step, which the ODE has not; use "
                "sampler='sde', or recipe='policy_gradient'. Evaluation runs the ODE besides, see eval_samplers."
            )
        # the steps of a rollout are Euler's, also of its ODE
        rollout = self._schedule(self.num_inference_steps, self.sampler, "euler")
        if isinstance(self.num_inference_steps_eval, int):
            self.num_inference_steps_eval = [self.num_inference_steps_eval]
        if not self.eval_samplers:
            raise ValueError("eval_samplers=[] evaluates nothing: name 'sde', 'ode' or both.")
        counts = list(dict.fromkeys(self.num_inference_steps_eval))
        if not counts or min(counts) < 1:
            raise ValueError(f"num_inference_steps_eval={counts} must be one or more numbers of steps, at least 1.")
        evaluation = {}
        for name in self.eval_samplers:
            for count in counts:
                schedule = self._schedule(count, name, self.eval_solver)
                one = len(counts) == 1 or schedule.num_evaluations is None
                evaluation[name if one else f"{name}_{count}"] = schedule
        return rollout, evaluation


DiffusionDistributionConfig.__doc__ = with_values(str(DiffusionDistributionConfig.__doc__))
