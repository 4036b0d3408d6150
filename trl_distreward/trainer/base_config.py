# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Self

from trl.trainer.base_config import _BaseConfig

from ..generation import TIME_GRIDS, SamplingSchedule
from ..policies import DiffusionPolicy
from ..sampling import NOISE_SCHEDULES

# Compile modes that record CUDA graphs, which overwrite the outputs that a sampler keeps between two calls
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def option(default: object, help: str, choices: Collection[str] | None = None) -> Any:
    """A dataclass field with a line for `--help`; a list is copied for each configuration."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DiffusionTrainerConfig(_BaseConfig):
    """Options of both trainers. A lower `metric_for_best_model` is better unless `greater_is_better=True`."""

    logging_steps: float = option(1, "Steps between two logs.")
    gradient_checkpointing: bool | None = option(None, "Alias of activation_checkpointing, which is preferred.")
    bf16: bool | None = option(False, "Whether to run the network under bfloat16 autocast.")
    overwrite_output_dir: bool = option(False, "Start in an output_dir with another run's checkpoints; delete them.")
    # 0 and not None: transformers multiplies it
    per_device_eval_batch_size: int = option(
        0, "Images at a time in reference sets, evaluations and merges. 0: 64, halved on a GPU until they fit."
    )

    # Parameters that control the reward
    reference_set_size: int = option(2500, "Images N of the generated set; 5000 in the paper.")
    stratify_by: str | None = option(
        None,
        "Column of the training dataset with strata, for example topics. The generated set, and every subset that "
        "is replaced, keeps each stratum's share of the dataset.",
    )
    reward_weights: list[float] | None = option(None, "Weights of several reward functions; all 1 by default.")

    # Parameters that control generation
    noise_schedule: str = option("sit", "Noise of the SDE, see sampling.transition.", NOISE_SCHEDULES)
    noise_level: float = option(1.0, "Level η of the noise; with 'sit', 1 is SiT's own sampler.")
    # a number after __post_init__; the command line knows one type
    last_step_size: str = option(
        "auto",
        "Size of a last SDE step without noise, which is not trained; 0: all steps have noise. 'auto': 0.04 on even "
        "steps, as SiT takes it; on any other grid the grid's own last step.",
    )
    time_grid: str = option(
        "auto",
        "Times of the steps. 'auto': those of the pipeline's own sampler: its scheduler's, EDM's for EDM2, even steps "
        "for SiT. 'uniform': even steps. 'karras': EDM's noise levels.",
        TIME_GRIDS,
    )
    time_shift: float = option(1.0, "Resolution shift of even steps; 1 is none.")
    guidance_scale: float = option(1.0, "Classifier-free guidance in training and evaluation; 1 is none.")
    guidance_channels: int | None = option(None, "Guides only the first channels; SiT guides 3 of 4. By default all.")
    decode_batch_size: int | None = option(None, "Samples that the VAE decodes at a time; a whole batch by default.")
    max_skipped_updates: int = option(5, "Updates in a row that may be skipped because values are not finite.")

    # Parameters that control evaluation
    log_samples: bool = option(True, "Write grids of 64 samples, see LogSamplesCallback.")
    num_eval_images: int | None = option(None, "Images per evaluation; reference_set_size by default.")
    eval_seed: int = option(0, "Seed of the evaluation noise, the same at every evaluation.")

    def __post_init__(self) -> None:
        self._check_choices()
        self._read_number("last_step_size", float)
        self._check_counts(("decode_batch_size", "per_device_train_batch_size"))
        self._check_counts(("per_device_eval_batch_size",), least=0)
        self._check_counts(("num_eval_images",), least=2)
        if self.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps must be 1: set per_device_train_batch_size instead.")
        if self.torch_compile_mode in _GRAPH_MODES or self.torch_compile_backend == "cudagraphs":
            asked = f"torch_compile_mode={self.torch_compile_mode!r}, backend {self.torch_compile_backend!r}"
            raise ValueError(f"{asked}: CUDA graphs overwrite what a sampler keeps. Leave both at their defaults.")
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give a number of updates, or -1 for num_train_epochs.")
        if self.max_steps > 0 and self.num_train_epochs != 3.0:  # Trainer's default
            both = f"num_train_epochs={self.num_train_epochs} and max_steps={self.max_steps} both end the training"
            raise ValueError(f"{both}: set max_steps=-1 to count epochs, or leave num_train_epochs out.")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better: bool | None = False
        super().__post_init__()

    @property
    def averages_weights(self) -> bool:
        """Whether training keeps an average of the weights."""
        return False

    @classmethod
    def of(cls, args: object, output_dir: str) -> Self:
        """Returns `args` if it is a configuration of this class; by default one for `output_dir`."""
        args = cls(output_dir=output_dir) if args is None else args
        if not isinstance(args, cls):
            raise TypeError(f"args is a {type(args).__name__}: pass a {cls.__name__}.")
        return args

    def bind(self, policy: DiffusionPolicy) -> None:
        """Takes over what the policy decides: its guidance, and what `"auto"` stands for in the schedules."""
        for name, none in (("guidance_scale", 1.0), ("guidance_channels", None)):
            asked, held = getattr(self, name), getattr(policy, name, none)
            if asked not in (none, held):
                raise ValueError(f"{name}={asked}, but the policy was made with {held}: make it with {asked}.")
            setattr(self, name, held)
        self.rollout_schedule: SamplingSchedule = self.rollout_schedule.on(policy)
        self.eval_schedules: dict[str, SamplingSchedule] = {k: s.on(policy) for k, s in self.eval_schedules.items()}
        for schedule in self.eval_schedules.values():
            len(schedule.times)  # a grid that cannot be made fails now, and not at the first evaluation

    def _read_number(self, name: str, kind: type) -> None:
        """Turns an option that is a number or the word "auto" into the number."""
        value = getattr(self, name)
        try:
            setattr(self, name, value if value in ("auto", None) else kind(value))
        except ValueError:
            raise ValueError(f"{name}={value!r} must be a number, or 'auto'.") from None

    def _schedule(self, num_steps: int, sampler: str, solver: str) -> SamplingSchedule:
        names = ("noise_schedule", "noise_level", "last_step_size", "time_grid", "time_shift")
        return SamplingSchedule(num_steps, sampler, solver=solver, **{name: getattr(self, name) for name in names})

    def _check_choices(self) -> None:
        for each in fields(self):
            value, allowed = getattr(self, each.name), each.metadata.get("choices")
            if allowed is not None and value is not None and value not in allowed:
                raise ValueError(f"{each.name}={value!r} is unknown: choose one of {', '.join(allowed)}.")

    def _check_counts(self, names: Iterable[str], least: int = 1) -> None:
        self._check_range(names, lambda value: value is None or value >= least, f"be at least {least}")

    def _check_range(self, names: Iterable[str], fits: Callable[..., bool], rule: str) -> None:
        for name in names:
            if not fits(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must {rule}.")
