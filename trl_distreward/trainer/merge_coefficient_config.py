# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

from ..generation import SOLVERS
from ..merging.coefficients import COEFFICIENT_MAPS, GRANULARITIES
from ..rewards.slots import check_size
from .base_config import DiffusionTrainerConfig, option

METHODS = ("emanet", "cma", "grid")
STARTS = ("post_hoc", "uniform", "last")


@dataclass
class MergeCoefficientConfig(DiffusionTrainerConfig):
    """
    Configuration of the [`MergeCoefficientTrainer`]: the options below, those of [`DiffusionTrainerConfig`], and
    those of [`~transformers.TrainingArguments`]. Each candidate generates `reference_set_size` images under the ODE,
    `per_device_eval_batch_size` at a time; the SDE's noise is for evaluation alone.
    """

    learning_rate: float = option(0.01, "Learning rate of the EMANet.")
    lr_scheduler_type: str = option("constant", "Learning rate schedule.")
    max_steps: int = option(15, "Steps; each judges num_generations candidates.")
    save_steps: float = option(5, "Steps between two checkpoints.")

    # Parameters that control the search
    method: str = option(
        "cma",
        "'cma': CMA-ES. 'emanet': a policy gradient on the mean of a Gaussian (Section 3.3 of arXiv 2607.02291). "
        "'grid': power-function averages of all widths. All judge equally many candidates.",
        METHODS,
    )
    num_generations: int = option(16, "Candidates B of a step, over all processes.")
    coefficient_map: str = option(
        "affine",
        "From samples to coefficients. 'softmax': positive, with sum one. 'affine': sum one, some may be "
        "negative. 'none': the samples themselves.",
        COEFFICIENT_MAPS,
    )
    granularity: str = option(
        "per_model",
        "One set of coefficients for the whole model, as in the paper, for each block, or for each kind of parameter.",
        GRANULARITIES,
    )
    initial_coefficients: str = option(
        "post_hoc",
        "Start of the search: 'post_hoc', a power-function average of width initial_std; 'uniform'; 'last'; or a "
        "number for each checkpoint, separated by commas on the command line.",
    )
    initial_std: float = option(0.1, "Relative width (σ_rel of arXiv 2312.02696) of the average under 'post_hoc'.")
    checkpoint_times: list[float] | None = option(None, "Training times of the checkpoints; by default 1, 2, …")
    checkpoint_stds: list[float] | None = option(None, "Relative widths of checkpoints that are averages, as EDM2's.")
    sampling_std: float = option(
        0.15, "Std of the samples; under 'cma' the first one. In the paper 1, with 'softmax'."
    )
    sampling_std_decay: float = option(0.3, "Share of it left at the last step of 'emanet', after a linear fall.")
    antithetic_sampling: bool = option(True, "Draws samples of 'emanet' in pairs, opposite about the mean.")
    policy_num_layers: int = option(3, "Layers of the EMANet; with 0 the mean itself is the parameter.")

    # Parameters that control the reward
    scale_set_size: int | None = option(
        None,
        "Images of the start's set, whose distances are the units of several feature spaces; reference_set_size by "
        "default. Use at least 1,000: small sets overstate distances.",
    )
    num_replacements: int = option(
        0, "New images N_r for each replaced subset (Eq. 10). 0: the reward is minus the distance of the whole set."
    )
    num_subsets: int = option(1, "Subsets N_s of the set that are replaced.")
    replace_size: int = option(50, "Images n of a subset.")

    # Parameters that control generation
    num_inference_steps: int = option(32, "Steps of the ODE that generates a candidate's images.")
    solver: str = option(
        "auto",
        "Solver of the ODE, see sampling.solve_ode. 'auto': 'heun_sigma' for EDM2 on its own grid, else 'euler'.",
        SOLVERS,
    )

    # Parameters that control evaluation
    num_inference_steps_eval: int | None = option(None, "Steps at evaluation; num_inference_steps by default.")
    eval_samplers: list[str] = option(["ode"], "Samplers that are evaluated.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_start()
        self._check_numbers()
        steps = self.num_inference_steps_eval or self.num_inference_steps
        self.rollout_schedule = self._schedule(self.num_inference_steps, "ode", self.solver)
        self.eval_schedules = {name: self._schedule(steps, name, self.solver) for name in self.eval_samplers}

    def _read_start(self) -> None:
        start = self.initial_coefficients
        if start in STARTS or not isinstance(start, str):
            return
        try:
            setattr(self, "initial_coefficients", [float(value) for value in start.split(",")])  # noqa: B010
        except ValueError:
            choices = f"choose one of {', '.join(STARTS)}, or give a number for each checkpoint"
            raise ValueError(f"initial_coefficients={start!r} is unknown: {choices}.") from None

    def _check_numbers(self) -> None:
        self._check_counts(("num_subsets", "replace_size", "max_steps"))
        self._check_counts(("num_replacements", "policy_num_layers"), least=0)
        self._check_counts(("num_generations", "reference_set_size", "scale_set_size"), least=2)
        std, decay = self.sampling_std, self.sampling_std_decay
        if std <= 0 or not 0 < decay <= 1:
            raise ValueError(f"sampling_std={std} must be positive, and sampling_std_decay={decay} lie in (0, 1].")
        if self.num_replacements:
            check_size(self.replace_size, self.reference_set_size)
        if self.fp16:
            raise ValueError("fp16=True scales gradients, but those of coefficients are not scaled: set bf16=True.")
        if self.save_only_model and self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end needs the state that save_only_model leaves out: set one.")

    @property
    def images_per_candidate(self) -> int:
        """Generated images per candidate."""
        return self.reference_set_size + self.num_subsets * self.num_replacements * self.replace_size

    def sampling_std_at(self, step: int) -> float:
        """Standard deviation of the samples at a step."""
        share = min(1.0, step / max(1, self.max_steps - 1))
        return self.sampling_std * (1 - share * (1 - self.sampling_std_decay))
