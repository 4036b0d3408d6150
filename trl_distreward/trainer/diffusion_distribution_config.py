# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass
from typing import Any

from ..generation import SOLVERS, SamplingSchedule
from ..policies import DiffusionPolicy
from ..rewards.slots import check_size
from .advantages import ADVANTAGE_NORMALIZATIONS, SELECTIONS
from .base_config import DiffusionTrainerConfig, option
from .estimators import ESTIMATORS

# Settings of arXiv 2607.02291, Section 4.1: DiffusionDistributionConfig(output_dir=..., **PAPER)
PAPER: dict[str, Any] = {
    "loss_type": "grpo",
    "sampler": "sde",
    "reference_set_size": 5000,
    "reference_update": "refresh",
    "reference_refresh_steps": "10",
    "num_subsets": 128,
    "replace_size": 50,
    "selection": "top",
    "top_advantage_quantile": 0.25,
    "num_inference_steps": 50,
    "num_inference_steps_eval": [250],
    "eval_samplers": ["sde", "ode"],
    "epsilon": 1e-4,
    "beta": 0.0,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_steps": 450,
    "ema_decay": 0.0,
}


@dataclass
class DiffusionDistributionConfig(DiffusionTrainerConfig):
    """
    Configuration of the [`DistributionRewardTrainer`]: the options below, those of [`DiffusionTrainerConfig`], and
    those of [`~transformers.TrainingArguments`]. The defaults are for a first run of 357,200 network
    evaluations; the paper's settings, `trl_distreward.PAPER`, take 530 times as many.
    """

    learning_rate: float = option(1e-5, "Initial learning rate; 1e-5 in the paper.")
    lr_scheduler_type: str = option("linear", "Learning rate schedule.")
    max_steps: int = option(100, "Optimizer steps; 450 in the paper. -1: num_train_epochs times the reference set.")
    save_steps: float = option(50, "Optimizer steps between two checkpoints.")
    ddp_find_unused_parameters: bool | None = option(False, "Whether DDP looks for unused parameters.")

    # Parameters that control the reward
    num_subsets: int = option(128, "Subsets B of an update, over all processes; a multiple of their number.")
    replace_size: int = option(1, "Images n of a subset. 1 gives every image its own reward; the paper uses 50.")
    reference_update: str = option(
        "rolling",
        "'rolling': new images stay in the places they were judged in, and slots are drawn without replacement. "
        "'refresh': the reference set is generated anew every reference_refresh_steps, as in the paper.",
        ("refresh", "rolling"),
    )
    # a number after __post_init__; the command line knows one type
    reference_refresh_steps: str = option(
        "10",
        "Optimizer steps between two refreshes. 'auto': refreshes when the mean reward has drifted by more than "
        "refresh_drift from that of the unchanged set.",
    )
    refresh_drift: float = option(
        0.5, "Drift that triggers a refresh: change of the distance if the whole set were replaced, relative to it."
    )
    best_of_n: int = option(1, "Candidates per slot; the one with the best replaced distance is kept (Appendix C).")

    # Parameters that control generation
    sampler: str = option(
        "auto",
        "Sampler of the rollouts. 'auto': 'sde' for 'grpo', which needs the density of each step, else 'ode'.",
        ("auto", "sde", "ode"),
    )
    num_inference_steps: int = option(20, "Steps of the rollouts and of the reference set; 50 in the paper.")
    sde_window_size: int | None = option(
        None,
        "Number of steps with noise; the others follow the ODE and are not trained. All steps by default. 1 or 2 "
        "with sde_window='random' is Flow-GRPO-Fast.",
    )
    sde_window: str = option(
        "sliding",
        "'sliding': the window moves from noise to data by one step every sde_window_interval rollouts, then "
        "starts again (MixGRPO, arXiv 2507.21802). 'random': drawn anew for each rollout.",
        ("sliding", "random"),
    )
    sde_window_interval: int = option(25, "Rollouts between two moves of the sliding window.")
    rollout_batch_size: int | None = option(None, "Images at a time in rollouts; 64, halved on a GPU until they fit.")

    # Parameters that control the update
    loss_type: str = option(
        "transport",
        "'transport': moves images along the rewards' gradient and matches the flow to that. 'nft': DiffusionNFT. "
        "'awm': advantage-weighted matching. 'rft': flow-matching loss (Eq. 2) on the selected images. 'grpo': "
        "clipped policy gradient (Eq. 6), the paper's. "
        "'backprop': gradient of the distance itself through sampling from the time backprop_from on.",
        ESTIMATORS.keys(),  # a view: estimators can be added from outside
    )
    backprop_from: float = option(
        0.3,
        "Time from which 'backprop' goes through the steps of sampling: 0 is data, 1 noise. Memory grows with their "
        "number, unless checkpoint_steps.",
    )
    checkpoint_steps: bool = option(False, "Recomputes each step's activations in the backward pass of 'backprop'.")
    advantage_normalization: str = option(
        "batch",
        "'batch': mean and standard deviation over all subsets of all processes (Eq. 5). 'group': over the "
        "num_generations subsets that replace the same slots. 'none': centred but not divided.",
        ADVANTAGE_NORMALIZATIONS,
    )
    num_generations: int = option(1, "Subsets that replace the same slots.")
    selection: str = option(
        "top",
        "Subsets that are trained on: 'top': the share top_advantage_quantile with the highest advantage; "
        "'top_bottom': that share at either end; 'all'.",
        SELECTIONS,
    )
    selection_scope: str = option(
        "global", "Whether the share is taken over all processes ('global') or in each ('local').", ("global", "local")
    )
    top_advantage_quantile: float = option(1.0, "Selected share; 1.0 keeps all, the paper uses 0.25.")
    timestep_fraction: float = option(1.0, "Share of the steps with noise that is trained, drawn for each rollout.")
    step_weighting: str = option("uniform", "'noise': by the noise's std (arXiv 2508.04324).", ("uniform", "noise"))
    ratio_normalization: bool = option(False, "Scales log-ratios of all steps alike (GRPO-Guard, arXiv 2510.22319).")
    epsilon: float = option(1e-4, "Clip range of the ratio, for log-probabilities averaged over dimensions.")
    beta: float = option(
        0.0,
        "Weight of the KL divergence from the initial model under 'grpo', otherwise of the mean squared difference of "
        "the two velocities; 0 loads no reference model.",
    )
    num_iterations: int = option(1, "Updates per rollout. With 1 the ratio of 'grpo' is exactly 1.")
    num_train_timesteps: int = option(2, "Times drawn per image by 'transport', 'nft', 'awm' and 'rft'.")
    condition_dropout: float = option(
        0.1, "Share of the pairs that these train without their condition, if guidance_scale is not 1."
    )
    old_policy_decay: float = option(
        0.5, "Share of the old policy that stays when it follows the weights before a rollout; 0: it is the policy."
    )
    sample_old_policy: bool = option(False, "Makes rollouts with the old policy, as DiffusionNFT does.")
    advantage_clip: float = option(1.0, "Advantage at which DiffusionNFT's pull is full, A_max in the paper.")
    nft_beta: float = option(1.0, "β of 'nft': how far its two branches are from the old policy.")
    transport_size: float = option(
        0.2, "Root mean square of the displacements of 'transport', in units of the sample, whose noise has std 1."
    )
    transport_advantage: float = option(0.5, "Weight of DiffusionNFT's pull by the advantage beside the displacement.")
    ema_decay: float = option(0.9, "Decay of an average of the weights, which is evaluated and saved; 0 keeps none.")
    offload_trajectories: bool = option(False, "Keeps the rollout's states in CPU memory until they are trained on.")

    # Parameters that control evaluation
    num_inference_steps_eval: list[int] = option(
        [20],
        "Steps at evaluation, 250 in the paper, whose gains depend on them (Table 3). Several are told apart by name: "
        "eval_sde_50_…, eval_sde_250_….",
    )
    eval_samplers: list[str] = option(["ode"], "Samplers that are evaluated: 'sde', 'ode' or both.")
    eval_solver: str = option(
        "auto",
        "Solver of the evaluated ODE, see sampling.solve_ode. 'auto': 'heun_sigma' for EDM2 on its own grid, else "
        "'euler'. 'dopri5' chooses its own steps and is evaluated once.",
        SOLVERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reward()
        self._check_update()
        estimator = ESTIMATORS[self.loss_type]
        estimator.check_config(self)
        # rollouts and their ODE take Euler's steps
        sampler = estimator.own_sampler if self.sampler == "auto" else self.sampler
        self.rollout_schedule = self._schedule(self.num_inference_steps, sampler, "euler")
        self.eval_schedules = self._evaluation_schedules()

    @property
    def averages_weights(self) -> bool:
        return self.ema_decay > 0 or ESTIMATORS[self.loss_type].uses_old

    def bind(self, policy: DiffusionPolicy) -> None:
        super().bind(policy)
        steps, size = len(self.rollout_schedule.trainable_steps), self.sde_window_size
        sde = self.rollout_schedule.sampler == "sde"
        if not steps and sde:
            raise ValueError(f"noise_level={self.noise_level} leaves no step with noise to train: raise it.")
        if size is not None and not 1 <= size <= steps:
            rule = f"must lie in 1 to {steps}, the number of steps with noise" if sde else "needs sampler='sde'"
            raise ValueError(f"sde_window_size={size} {rule}.")

    def _check_reward(self) -> None:
        self._read_number("reference_refresh_steps", int)
        if self.reference_refresh_steps != "auto":
            self._check_counts(("reference_refresh_steps",))
        elif self.reference_update == "refresh" and self.best_of_n > 1:
            reason = "chosen images beat the reference set without any drift: give a number of steps"
            raise ValueError(f"best_of_n={self.best_of_n} with reference_refresh_steps='auto': {reason}.")
        self._check_counts(("num_subsets",), least=2)
        self._check_counts(("replace_size", "num_iterations", "best_of_n"))
        self._check_counts(("sde_window_interval", "rollout_batch_size", "num_train_timesteps"))
        check_size(self.replace_size, self.reference_set_size)

    def _check_update(self) -> None:
        if self.num_generations < 1 or self.num_subsets % self.num_generations:
            raise ValueError(f"num_generations={self.num_generations} must divide num_subsets={self.num_subsets}.")
        if self.advantage_normalization == "group" and self.num_generations < 2:
            raise ValueError("advantage_normalization='group' with num_generations=1: set it to 2 or more.")
        self._check_range(("top_advantage_quantile", "timestep_fraction"), lambda x: 0 < x <= 1, "lie in (0, 1]")
        self._check_range(("ema_decay", "old_policy_decay"), lambda x: 0 <= x < 1, "lie in [0, 1)")
        self._check_range(("epsilon", "advantage_clip", "nft_beta", "transport_size"), lambda x: x > 0, "be positive")
        self._check_range(("beta",), lambda x: x >= 0, "be at least 0")

    def _evaluation_schedules(self) -> dict[str, SamplingSchedule]:
        if isinstance(self.num_inference_steps_eval, int):
            self.num_inference_steps_eval = [self.num_inference_steps_eval]
        counts, schedules = list(dict.fromkeys(self.num_inference_steps_eval)), {}
        for name in self.eval_samplers:
            for count in counts:
                schedule = self._schedule(count, name, self.eval_solver)
                single = len(counts) == 1 or schedule.num_evaluations is None
                schedules[name if single else f"{name}_{count}"] = schedule
        return schedules
