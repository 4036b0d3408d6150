# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..generation import TIME_GRIDS, SamplingSchedule
from ..policies import DiffusionPolicy
from ..sampling import NOISE_SCHEDULES

# Compile modes that record CUDA graphs, which overwrite the outputs that a sampler keeps between two calls
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """A dataclass field with a line for `--help`; a list is copied for each configuration."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DiffusionTrainerConfig(_BaseConfig):
    """
    Options that both trainers share, on top of [`~transformers.TrainingArguments`].

    Other defaults than there: `logging_steps=1`, `remove_unused_columns=False`. A lower value of
    `metric_for_best_model` is better unless `greater_is_better` says otherwise.
    """

    logging_steps: float = option(1, "Steps between two logs.")
    gradient_checkpointing: bool | None = option(
        None, "Alias of activation_checkpointing, which transformers prefers."
    )
    bf16: bool | None = option(False, "Whether to run the network under bfloat16 autocast.")
    remove_unused_columns: bool | None = option(False, "Kept False: columns are conditions.")

    # Parameters that control the reward
    reference_set_size: int = option(5000, "Images N of the generated set.")
    stratify_by: str | None = option(
        None,
        "Column of the training dataset with strata, for example topics. The generated set, and every subset that "
        "is replaced, keeps each stratum's share of the dataset.",
    )
    reward_weights: list[float] | None = option(None, "Weights of several reward functions; all 1 by default.")

    # Parameters that control generation
    noise_schedule: str = option(
        "sit", "Noise of the SDE: 'sit', 'flow_grpo', 'dance' or 'cps', see sampling.transition.", NOISE_SCHEDULES
    )
    noise_level: float = option(1.0, "Level η of the noise; with 'sit', 1 is SiT's own sampler.")
    last_step_size: float = option(
        0.04, "Size of a last SDE step without noise, as SiT takes it; it is not trained. 0: all steps are equal."
    )
    time_grid: str = option(
        "uniform",
        "'uniform': even steps. 'karras': EDM's noise levels. 'auto': the grid of the pipeline's scheduler. The "
        "SDE on the latter two needs last_step_size=0.",
        TIME_GRIDS,
    )
    time_shift: float = option(1.0, "Resolution shift of an even grid; 1 is none.")
    guidance_scale: float = option(1.0, "Classifier-free guidance in training and evaluation; 1 is none.")
    guidance_channels: int | None = option(
        None, "Guides only the first channels; all by default. SiT's own code guides 3 of its latent's 4."
    )
    decode_batch_size: int | None = option(
        None, "Samples decoded at a time; a whole batch by default. Lower it if the VAE runs out of memory."
    )
    max_skipped_updates: int = option(
        5, "Stops training after more updates in a row were skipped because of values that are not finite."
    )

    # Parameters that control evaluation
    num_eval_images: int | None = option(
        None, "Images per evaluation; reference_set_size by default. Compare distances only at equal numbers."
    )
    eval_seed: int = option(0, "Seed of the evaluation noise, the same at every evaluation.")

    def __post_init__(self) -> None:
        self._check_counts(("decode_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"))
        self._check_counts(("num_eval_images",), least=2)
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size=True has no effect here: set per_device_train_batch_size.")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} must be 1: an update already "
                "accumulates over all its images, per_device_train_batch_size at a time."
            )
        if self.torch_compile_mode in _GRAPH_MODES or self.torch_compile_backend == "cudagraphs":
            raise ValueError(
                f"torch_compile_mode={self.torch_compile_mode!r}, torch_compile_backend="
                f"{self.torch_compile_backend!r}: CUDA graphs overwrite what a sampler keeps. Leave both at their "
                "defaults."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give a number of updates, or -1 for num_train_epochs.")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better: bool | None = False
        super().__post_init__()

    def bind(self, policy: DiffusionPolicy) -> None:
        """
        Takes over what the policy decides: its guidance, and its grid under `time_grid="auto"`.

        Raises:
            ValueError: the policy was made with other guidance than the configuration asks for.
        """
        for name, none in (("guidance_scale", 1.0), ("guidance_channels", None)):
            asked, held = getattr(self, name), getattr(policy, name, none)
            if asked not in (none, held):
                raise ValueError(
                    f"{name}={asked}, but the policy was made with {held}: make it with {asked}, or leave {name} out."
                )
            setattr(self, name, held)
        evaluation = {name: schedule.on(policy) for name, schedule in self.eval_schedules.items()}
        self._set_schedules(self.rollout_schedule.on(policy), evaluation)
        for schedule in self.eval_schedules.values():
            len(schedule.times)  # a grid that cannot be made fails now, and not at the first evaluation

    def guidance(self) -> dict[str, Any]:
        """The guidance arguments of [`as_policy`]."""
        channels = {} if self.guidance_channels is None else {"guidance_channels": self.guidance_channels}
        return {"guidance_scale": self.guidance_scale, **channels}

    def _set_schedules(self, rollout: SamplingSchedule, evaluation: Mapping[str, SamplingSchedule]) -> None:
        """Sets how images are sampled in training, and in evaluation by name."""
        self.rollout_schedule: SamplingSchedule = rollout
        self.eval_schedules: dict[str, SamplingSchedule] = dict(evaluation)

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

    def _check_choices(self, choices: Mapping[str, Collection[str]]) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")

    def _check_counts(self, names: Iterable[str], least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
