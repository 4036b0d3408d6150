# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What any trainer of a diffusion policy needs besides checkpoints: preparation, pacing, logging, guards, evaluation.

`transformers.Trainer` takes the network for a language model: it writes to its config, asks for a dataset, evaluates
per example. Every such expectation is met or overridden here.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from diffusers.configuration_utils import FrozenDict
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    get_last_checkpoint,
    speed_metrics,
)

from ..conditions import conditions_of_slots, take
from ..generation import SamplingSchedule, evaluating, image_generators, sample
from ..merging.adapters import changes_base
from ..metrics.image_metrics import ImageMetric
from ..policies import DiffusionPolicy, decode_uint8
from .callbacks import NormalizeWeights, StopOnSIGTERM, UpdateEMA, asks_for_normalization
from .cuda_graphs import copy_outputs, hold_gradients, uses_cuda_graphs
from .ema import PolicyEMA
from .publishing import SKIPPED_FOLDER, PublishingTrainer
from .run_record import KeepRecord, RunRecord, is_evaluation
from .sharding import is_split, without_weights

logger = get_logger(__name__)

# The names diffusers gives to attention projections, adapted by default
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# What is counted between two logs, and not averaged
_COUNTS = {"skipped_updates"}


class _NetworkConfig(FrozenDict):
    """A diffusers config that also answers what transformers' callbacks ask of a model's config."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # Trainer sets `use_cache`, which must not reach the saved config


def disable_dropout(model: nn.Module) -> None:
    """Turns every dropout off for good, label dropout included.

    A policy must predict the same in rollout and replay: with label dropout on, the two differ by far more than the
    clip range.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        for name in ("dropout_prob", "class_dropout_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
        if isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0


def _is_enabled(**_: Any) -> None:
    """Does nothing, as there is nothing left to do."""


class DiffusionTrainer(PublishingTrainer):
    """
    Base of the trainers of a [`DiffusionPolicy`]: preparation, pacing, logging, guards and evaluation.

    Args:
        policy ([`DiffusionPolicy`]): what is trained.
        args ([`DiffusionTrainerConfig`]): configuration.
        steps_per_epoch (`int`): optimizer steps that count as an epoch.
        eval_metrics (`dict[str, ImageMetric]`): metrics of the evaluated images.
        ema_decay (`float`): decay of the average of the weights; 0 keeps none.
        peft_config ([`~peft.PeftConfig`], *optional*): trains an adapter in place of the network's own weights.
        train_dataset, eval_dataset, callbacks, optimizers: as in [`~transformers.Trainer`]; `eval_dataset` has the
            conditions of the evaluated images, which without one are those of all classes or the training prompts.
    """

    # Losses are weighted over the whole update before they are returned.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        args: Any,
        steps_per_epoch: int,
        eval_metrics: dict[str, ImageMetric],
        ema_decay: float = 0.0,
        peft_config: PeftConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        self.policy = policy
        self.steps_per_epoch = steps_per_epoch
        if policy.num_conditions is None:
            self._pipeline_tag = "text-to-image"
            eval_dataset = train_dataset if eval_dataset is None else eval_dataset
        num_eval = args.num_eval_images or args.reference_set_size
        self.eval_conditions = conditions_of_slots(policy, eval_dataset, num_eval, args.eval_seed)
        self.eval_metrics = eval_metrics
        self.ema: PolicyEMA | None = None
        self.control: Any
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._uploads: list[Future] = []
        self.num_images = 0  # generated for training
        self.run_record = RunRecord()
        self._skipped_in_a_row = 0
        self._without_update = False
        self._holds_best = False  # what is evaluated is of an earlier update than the last
        network = self._prepare_network(policy.model, args, peft_config)
        self._skeleton = without_weights(network)
        self._stop_on_sigterm = StopOnSIGTERM()
        super().__init__(
            model=network,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            # evaluation generates its own images; transformers only asks that something be there
            eval_dataset=eval_dataset if eval_dataset is not None else [],
            callbacks=[NormalizeWeights(self), UpdateEMA(self), self._stop_on_sigterm, KeepRecord(self)]
            + (callbacks or []),
            optimizers=optimizers,
        )
        self._check_launch(ema_decay)
        policy.to(self.accelerator.device)
        for metric in self.eval_metrics.values():
            if hasattr(metric, "to"):
                metric.to(self.accelerator.device)
        if ema_decay > 0:
            self.ema = PolicyEMA(self.network, ema_decay)

    @staticmethod
    def _prepare_network(network: nn.Module, args: Any, peft_config: PeftConfig | None) -> nn.Module:
        if args.activation_checkpointing:
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise ValueError(
                    f"{type(network).__name__} does not support gradient checkpointing: set "
                    "activation_checkpointing=False."
                )
            network.enable_gradient_checkpointing()  # type: ignore[operator]
            # Trainer calls a method that diffusers' models do not have; a bound one would tie copies to themselves
            network.activation_checkpointing_enable = _is_enabled  # type: ignore[assignment]
        if hasattr(network, "_internal_dict"):
            network._internal_dict = _NetworkConfig(network._internal_dict)
        if peft_config is not None:
            start = getattr(peft_config, "init_lora_weights", None)
            if changes_base(start):
                raise ValueError(
                    f"init_lora_weights={start!r} changes the weights below the adapter: without it the network would "
                    "not be what beta pulls to, and the adapter would fit no other copy. Leave it at True, or use "
                    "'gaussian' or 'orthogonal'."
                )
            if getattr(peft_config, "target_modules", False) is None:
                peft_config.target_modules = getattr(network, "_lora_target_modules", list(ATTENTION_PROJECTIONS))
            peft_config.task_type = None  # a language-model task would wrap the network in a class it does not fit
            network.requires_grad_(False)
            set_seed(args.seed)  # the adapter starts the same on every process
            network = get_peft_model(network, peft_config)
        elif any(p.dtype != torch.float32 for p in network.parameters() if p.requires_grad):
            logger.warning(
                "The network's weights are in half precision, which loses small updates: they are trained in float32. "
                "Set bf16=True to run the network in bfloat16 all the same."
            )
            network.float()
        if asks_for_normalization(network):
            network.normalize_weights()  # type: ignore[operator]
        disable_dropout(network)  # the adapter's own as well
        return network

    def _check_launch(self, ema_decay: float) -> None:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(
                    f"fsdp_version={plugin.fsdp_version} is not supported: set fsdp_version: 2, as in "
                    "examples/accelerate_configs/fsdp2.yaml."
                )
            if plugin.mixed_precision_policy is not None:
                # Times would be rounded as well: in bfloat16, 0.98 and 0.984 are the same. Autocast rounds what the
                # network multiplies, as without FSDP.
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)
        if self.is_deepspeed_enabled and ema_decay > 0:
            raise ValueError(
                f"ema_decay={ema_decay} is not supported under DeepSpeed, whose optimizer holds the weights: set "
                "ema_decay=0, or launch with examples/accelerate_configs/fsdp2.yaml."
            )
        if self.is_deepspeed_enabled and asks_for_normalization(self.network):
            raise ValueError(
                "forced_weight_normalization=True is not supported under DeepSpeed, whose optimizer holds the "
                "weights: launch without it."
            )
        adaptive = [name for name, schedule in self.args.eval_schedules.items() if schedule.num_evaluations is None]
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if adaptive and (self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)):
            raise ValueError(
                f"evaluation under {adaptive[0]!r} takes a number of forward passes that differs between processes, "
                "which FSDP and ZeRO-3 must make together: choose eval_solver='heun', or launch without them."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, which Trainer would drive with DataParallel and without "
                f"autocast: start one process per GPU, e.g. torchrun --nproc_per_node {self.args.n_gpu}, or set "
                "CUDA_VISIBLE_DEVICES to one."
            )
        if self.accelerator.device.type == "mps":
            raise ValueError("distances need float64, which the MPS device has not: set use_cpu=True.")

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.ema is not None and is_split(self.network):
            self.ema.share_out(self.network)
        if uses_cuda_graphs(self.args):
            copy_outputs(self.model_wrapped)
        if resume_from_checkpoint is not None and self._has_ended:  # no step follows at which Trainer would
            self._load_rng_state(resume_from_checkpoint)
        return prepared

    @property
    def _has_ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._has_ended:  # resumed within an epoch, Trainer would make one more update
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def hold_gradients(self) -> None:
        """Before the micro-batches of an update, where the compiler's graphs would keep gradients in their memory."""
        if uses_cuda_graphs(self.args) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            hold_gradients(self.network)

    # ---- pacing and logging ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str) and not Path(resume_from_checkpoint, TRAINER_STATE_NAME).is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is no folder with a {TRAINER_STATE_NAME}: name a "
                "checkpoint-* folder of a run, or give True for the newest one in output_dir."
            )
        self.run_record.begin()
        self._holds_best = self._without_update = False
        self._skipped_in_a_row = 0
        self._metrics.clear()  # of a training that ended with an error
        try:
            with self.run_record.running():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            loads_best = self.args.load_best_model_at_end and not self.interrupted
            if loads_best and self.state.best_model_checkpoint is not None:
                self._holds_best = self.state.best_global_step != self.state.global_step
            return result
        finally:
            self._stop_on_sigterm.restore()
            self.write_record()

    @property
    def interrupted(self) -> bool:
        """Whether the last `train()` ended on SIGTERM, with a checkpoint to resume from."""
        return self._stop_on_sigterm.stopped

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.interrupted:
            return super()._finalize_training(*args, **kwargs)
        # of a run that has ended the best model is loaded, and at save_total_limit=1 every other checkpoint deleted
        loads_best, limit = self.args.load_best_model_at_end, self.args.save_total_limit
        self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = loads_best, limit

    def get_train_dataloader(self) -> DataLoader:
        """Numbers that pace the steps; no state rides on their order."""
        return DataLoader(range(self.steps_per_epoch), batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def _send_telemetry(self) -> None:
        """Sends nothing: TRL's telemetry reads a language model's config."""

    def record(self, name: str, value: float) -> None:
        """Keeps a value for the next log, where the mean of those kept is written, or of counts the sum."""
        self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not is_evaluation(logs):
            recorded = self._metrics.items()
            logs = logs | {key: sum(values) / (1 if key in _COUNTS else len(values)) for key, values in recorded}
            logs["num_images"] = self.num_images  # as it is now, and no mean over steps
            self._metrics.clear()
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no per-example predictions: use evaluate().")

    def autocast(self) -> AbstractContextManager:
        """What the network runs under, in rollouts as in training; transitions stay in float32."""
        if self.is_deepspeed_enabled and (
            self.args.bf16 or self.args.fp16
        ):  # which keeps the weights in half precision
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            return torch.autocast(self.accelerator.device.type, dtype)
        return self.accelerator.autocast()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.record(f"seconds/{phase}", seconds)
        self.run_record.seconds[phase] += seconds

    # ---- guards ----

    def skip_update(self, reason: str, **context: Any) -> None:
        """
        Counts an update that cannot be made, and keeps what is needed to look into it.

        Raises:
            RuntimeError: more than `max_skipped_updates` in a row.
        """
        self._skipped_in_a_row += 1
        self._note_skipped(reason)
        step, limit = self.state.global_step, self.args.max_skipped_updates
        path = os.path.join(self.args.output_dir, SKIPPED_FOLDER, f"step-{step}.pt")
        if self.accelerator.is_main_process:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.save({"step": step, "reason": reason, "seed": self.args.seed, **context}, path)
        logger.warning(f"Update {step} is skipped: {reason}. Its context is in {path}.")
        if self._skipped_in_a_row > limit:
            last = self._last_checkpoint()
            remedy = f"resume from {last}" if last else "start again"
            raise RuntimeError(
                f"{self._skipped_in_a_row} updates in a row were skipped (max_skipped_updates={limit}), the last "
                f"because {reason}: lower the learning rate or noise_level, then {remedy}."
            )

    def _note_skipped(self, reason: str) -> None:
        self.record("skipped_updates", 1.0)
        self.run_record.skipped.append({"step": self.state.global_step, "reason": reason})

    def _last_checkpoint(self) -> str | None:
        return get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Drops gradients that are not finite before the optimizer sees them; they are so on every process."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._without_update:  # nothing to step along: zero gradients would move weights by momentum
            self._without_update = False
            model.zero_grad(set_to_none=True)
            return 0.0 if norm is None else norm
        if norm is None or torch.isfinite(torch.as_tensor(norm)):
            self._skipped_in_a_row = 0
        elif self.is_deepspeed_enabled and not self.args.fp16:  # its step is already made
            last = self._last_checkpoint()
            raise RuntimeError(
                "the gradient is not finite, and DeepSpeed has already taken the step: lower the learning rate or "
                f"noise_level, then {f'resume from {last}' if last else 'start again'}."
            )
        elif self.is_deepspeed_enabled or (self.accelerator.scaler and self.accelerator.scaler.get_scale() >= 1):
            self._note_skipped("the gradient overflows in float16: the scaler skips the step and lowers its scale")
        else:
            if self.accelerator.scaler is None:  # which skips by itself, and wants gradients to look at
                model.zero_grad(set_to_none=True)
            self.skip_update("the gradient is not finite", grad_norm=float(norm))
        return norm

    # ---- generation and evaluation ----

    def _share_of_images(
        self,
        model: nn.Module,
        conditions: Any,
        schedule: SamplingSchedule,
        noise: tuple[int, str, int],
        description: str,
    ) -> Iterator[tuple[Tensor, Any, int, Tensor]]:
        """
        Generates one image per condition, each process a share of every batch.

        Args:
            noise (`tuple`): seed, stream and step of [`~generation.image_generators`].

        Yields:
            this process's uint8 images and their conditions, and how many rows of all processes' together count: the
            last batch is filled up with its last image. Last, which of this process's samples and images are finite.
        """
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        starts = range(0, len(conditions), size * processes)
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=len(conditions), desc=description, unit="image", leave=False, disable=hidden) as bar:
            for start in starts:
                valid = min(size * processes, len(conditions) - start)
                per_process = math.ceil(valid / processes)
                first = start + rank * per_process
                own = [min(i, len(conditions) - 1) for i in range(first, first + per_process)]
                batch = take(conditions, own)
                generators = image_generators(*noise, own)
                with self.autocast():  # the network only: decoding and features stay in full precision
                    x = sample(self.policy, model, batch, schedule, generators).sample
                images, finite = decode_uint8(self.policy, x, self.args.decode_batch_size)
                yield images, batch, valid, finite
                bar.update(valid)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        seed: int | None = None,
    ) -> dict[str, float]:
        """
        Generates images under every evaluated sampler, from the same noise each time, and computes the metrics.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): conditions to use instead of the trainer's.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): prefix of the metrics' names.
            seed (`int`, *optional*): seed of the noise; `eval_seed` by default.

        Returns:
            `dict[str, float]`: `{prefix}_{sampler}_{metric}`, e.g. `eval_ode_distance_features`.
        """
        started = time.perf_counter()
        conditions = self.eval_conditions
        if eval_dataset is not None:
            number = self.args.num_eval_images or len(eval_dataset)
            conditions = conditions_of_slots(self.policy, eval_dataset, number, self.args.eval_seed)
        seed = self.args.eval_seed if seed is None else seed
        values = self._evaluate_samplers(conditions, seed)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        number = len(conditions) * len(self.args.eval_schedules)
        elapsed = time.perf_counter() - started
        metrics.update(speed_metrics(metric_key_prefix, time.time() - elapsed, num_samples=number))
        metrics = broadcast_object_list([metrics])[0]  # what is best must be so on every process
        self._note_evaluation(values, seed, metric_key_prefix, eval_dataset is not None)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.write_record()
        return metrics

    def _note_evaluation(self, values: dict[str, float], seed: int, prefix: str, other_conditions: bool) -> None:
        about: dict[str, Any] = {"step": self.state.global_step, "num_images": self.num_images, "seed": seed}
        of = [f"the best model, of update {self.state.best_global_step}"] if self._holds_best else []
        if prefix != "eval" or other_conditions:
            of.append(f"{prefix}, {'other' if other_conditions else 'the same'} conditions")
        if of:
            about["of"] = ", ".join(of)
        self.run_record.evaluations.append(about | {"values": values})

    @property
    def sampled_model(self) -> nn.Module:
        """The network that images are generated with, as it is wrapped for training."""
        return self.model_wrapped

    @property
    def sampled_network(self) -> nn.Module:
        """The same without distributed or compiled wrappers."""
        return self.unwrapped(self.sampled_model)

    def _evaluate_samplers(self, conditions: Any, seed: int) -> dict[str, float]:
        """`{sampler}_{metric}` of images from noise of `seed`."""
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.model is self.model_wrapped:
            self.model.to(self.accelerator.device)  # before training they leave it where it was loaded
        self.run_record.images["evaluation"] += len(conditions) * len(self.args.eval_schedules)
        metrics: dict[str, float] = {}
        with (
            evaluating(self.sampled_model) as model,
            self.run_record.running(),
            self.run_record.timed("evaluation"),
            self.evaluation_weights(),
        ):
            for sampler, schedule in self.args.eval_schedules.items():
                values = self._evaluate_sampler(model, conditions, schedule, seed, f"Evaluation, {sampler}")
                metrics.update({f"{sampler}_{name}": value for name, value in values.items()})
        return metrics

    def _evaluate_sampler(
        self, model: nn.Module, conditions: Any, schedule: SamplingSchedule, seed: int, description: str
    ) -> dict[str, float]:
        for metric in self.eval_metrics.values():
            metric.reset()
        batches = self._share_of_images(model, conditions, schedule, (seed, "evaluation", 0), description)
        for images, batch, valid, finite in batches:
            gathered = self.accelerator.gather(images)[:valid]
            if not bool(self.accelerator.gather(finite).all()):
                raise ValueError(f"{description}: generated samples are not finite; the model has diverged.")
            labels = self._gather_conditions(batch)[:valid]
            for metric in self.eval_metrics.values():
                metric.update(gathered, labels)
        values = {name: float(metric.compute()) for name, metric in self.eval_metrics.items()}
        for metric in self.eval_metrics.values():
            metric.reset()  # frees the features
        return values

    def _gather_conditions(self, conditions: Any) -> Any:
        if isinstance(conditions, Tensor):
            return self.accelerator.gather(conditions.to(self.accelerator.device))
        return gather_object(conditions)
