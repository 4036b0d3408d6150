# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from trl.trainer.base_config import _BaseConfig

from ..generation import TIME_GRIDS, SamplingSchedule
from ..policies import DiffusionPolicy
from ..sampling import NOISE_SCHEDULES


@dataclass
class DiffusionTrainerConfig(_BaseConfig):
    r"""
    What the configurations of both trainers have: the size of the generated set, how images are sampled in training
    and evaluation, and what is evaluated.

    Parameters:
        > Parameters that control the reward

        reference_set_size (`int`, *optional*, defaults to `5000`):
            Images N of the generated set.
        stratify_by (`str`, *optional*):
            Column of the training dataset with strata, for example topics or clusters of prompts
            ([`~strata.cluster_embeddings`]). The generated set, and every subset of it that is replaced,
            then have each stratum in proportion to its share of the dataset.
        reward_weights (`list[float]`, *optional*):
            Weights of several reward functions; all 1 by default.

        > Parameters that control generation

        noise_schedule (`str`, *optional*, defaults to `"sit"`):
            Of the SDE: `"sit"`, `"flow_grpo"`, `"dance"` or `"cps"`, see [`~sampling.transition`].
        noise_level (`float`, *optional*, defaults to `1.0`):
            η of the noise schedule; with `"sit"`, 1 is SiT's own sampler.
        last_step_size (`float`, *optional*, defaults to `0.04`):
            Size of the SDE's last step, without noise: SiT's "Mean" step, which is not trained. 0 or `None`: all steps
            are equal.
        time_grid (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`; `"karras"`: EDM's noise levels, which EDM2 is sampled with; or `"auto"`: the times of the
            pipeline's own scheduler, in training as in evaluation. The SDE on the latter two needs `last_step_size=0`.
        time_shift (`float`, *optional*, defaults to `1.0`):
            Resolution shift of the time grid; 1 is none.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Classifier-free guidance in training and evaluation; 1 is none.
        guidance_channels (`int`, *optional*):
            Guide so many of the first channels only; all by default. SiT's own code guides 3 of the latent's 4.
        decode_batch_size (`int`, *optional*):
            Samples decoded to images at a time, of those generated together; all by default. The VAE then takes no
            more memory than so many images need, but for what `loss_type="backprop"` decodes with gradients.
        max_skipped_updates (`int`, *optional*, defaults to `5`):
            Updates in a row that may be skipped for values that are not finite before training stops.

        > Parameters that control evaluation

        num_eval_images (`int`, *optional*):
            Images per evaluation; `reference_set_size` by default. Compare distances only at equal numbers.
        eval_seed (`int`, *optional*, defaults to `0`):
            Seed of the evaluation noise, the same at every evaluation and never that of training.

    > Parameters with other defaults than [`~transformers.TrainingArguments`]: `lr_scheduler_type="constant"`,
    > `logging_steps=1`, `remove_unused_columns=False`. A lower value of `metric_for_best_model` is the better one
    > unless `greater_is_better` says otherwise; a metric that says itself which way is up must agree.
    """

    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Alias of activation_checkpointing, which transformers prefers."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the network under bfloat16 autocast."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Kept False: columns are conditions."})

    # Parameters that control the reward
    reference_set_size: int = field(default=5000, metadata={"help": "Images of the generated set."})
    stratify_by: str | None = field(
        default=None, metadata={"help": "Column of strata that the generated set and its subsets have in proportion."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several reward functions; all 1 by default."}
    )

    # Parameters that control generation
    noise_schedule: str = field(
        default="sit", metadata={"help": "Noise schedule of the SDE.", "choices": list(NOISE_SCHEDULES)}
    )
    noise_level: float = field(default=1.0, metadata={"help": "Noise level of the SDE."})
    last_step_size: float | None = field(
        default=0.04, metadata={"help": "Size of the SDE's last step, without noise; 0: all steps are equal."}
    )
    time_grid: str = field(
        default="uniform", metadata={"help": "Spacing of the time grid.", "choices": list(TIME_GRIDS)}
    )
    time_shift: float = field(default=1.0, metadata={"help": "Resolution shift of the time grid."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is none."})
    guidance_channels: int | None = field(
        default=None, metadata={"help": "Guide so many of the first channels only; 3 is what SiT's code does."}
    )
    decode_batch_size: int | None = field(
        default=None, metadata={"help": "Samples decoded to images at a time; None: all that are generated together."}
    )
    max_skipped_updates: int = field(
        default=5, metadata={"help": "Updates in a row that may be skipped for values that are not finite."}
    )

    # Parameters that control evaluation
    num_eval_images: int | None = field(default=None, metadata={"help": "Images per evaluation."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the evaluation noise."})

    def __post_init__(self) -> None:
        batches = ("decode_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size")
        self._check_counts(batches)
        self._check_counts(("num_eval_images",), least=2)
        self._check_counts(("seed", "eval_seed"), least=0)
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True is not supported, as an update makes its micro-batches itself: set "
                "per_device_train_batch_size, and --dry-run says what a step takes."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give a number of updates, or -1 for num_train_epochs.")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better: bool | None = False
        super().__post_init__()

    def bind(self, policy: DiffusionPolicy) -> None:
        """
        Takes what is the policy's own: its guidance, and its scheduler's times where `time_grid="auto"`.

        Raises:
            ValueError: the policy was made with other guidance than is asked for.
        """
        for name, none in (("guidance_scale", 1.0), ("guidance_channels", None)):
            asked, held = getattr(self, name), getattr(policy, name, none)
            if asked not in (none, held):
                raise ValueError(
                    f"{name}={asked}, but the {type(policy).__name__} that is given as model has {held}: make it with "
                    f"that one, or leave {name} out."
                )
            setattr(self, name, held)
        evaluation = {name: schedule.on(policy) for name, schedule in self.eval_schedules.items()}
        self._set_schedules(self.rollout_schedule.on(policy), evaluation)

    def guidance(self) -> dict[str, Any]:
        """What [`as_policy`] is told of guidance."""
        channels = {} if self.guidance_channels is None else {"guidance_channels": self.guidance_channels}
        return {"guidance_scale": self.guidance_scale, **channels}

    def _set_schedules(self, rollout: SamplingSchedule, evaluation: dict[str, SamplingSchedule]) -> None:
        """How images are sampled in training, and in evaluation by names."""
        self.rollout_schedule, self.eval_schedules = rollout, evaluation

    def _schedule(self, num_steps: int, sampler: str, solver: str) -> SamplingSchedule:
        return SamplingSchedule(
            num_steps,
            sampler,
            noise_schedule=self.noise_schedule,
            noise_level=self.noise_level,
            last_step_size=self.last_step_size or None,
            solver=solver,
            time_grid=self.time_grid,
            time_shift=self.time_shift,
        )

    def _check_types(self) -> None:
        """That whole numbers and lists are so: values of a YAML file are what they look like there."""
        for name, field_ in type(self).__dataclass_fields__.items():
            value, kinds = getattr(self, name), get_args(field_.type) or (field_.type,)
            if isinstance(value, float) and int in kinds and float not in kinds:
                raise ValueError(f"{name}={value} must be a whole number: write it without a point.")
            if isinstance(value, str) and value and get_origin(field_.type) is list:
                raise ValueError(f"{name}={value!r} must be a list: write [{value}] in YAML.")

    def _check_choices(self, choices: Mapping[str, Sequence[str]]) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")

    def _check_counts(self, names: Iterable[str], least: int = 1) -> None:
        """That fields are at least so much, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                optional = type(self).__dataclass_fields__[name].default is None
                raise ValueError(f"{name}={value} must be at least {least}{', or None' if optional else ''}.")

    def _default(self, name: str) -> Any:
        return type(self).__dataclass_fields__[name].default

    def _refuse_ignored(self, names: Iterable[str], because: str, remedy: str) -> None:
        """What nothing has a use for must be at its default, so that nobody believes it does something."""
        for name in names:
            value, default = getattr(self, name), self._default(name)
            if value != default and str(value) != str(default):
                raise ValueError(
                    f"{name}={value!r} does nothing under {because}: leave it at {default!r}, or {remedy}."
                )
