# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Base of both trainers: what `transformers.Trainer` takes for a language model, met or overridden.

All private names of transformers that this library overrides are overridden here.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput, rotate_checkpoints, speed_metrics
from trl.trainer.base_trainer import _BaseTrainer

from ..conditions import EvalRows, Rows, as_rows
from ..evaluation.image_metrics import ImageMetric, as_metric
from ..files import State
from ..hub import with_retries
from ..policies import Model, as_policy
from . import checkpointing, resuming
from .base_config import DiffusionTrainerConfig
from .callbacks import LogSamplesCallback, UpdateWeights, add_default_callbacks
from .checks import check_launch, check_rewards_and_metrics
from .ema import PolicyEMA
from .image_sets import evaluate_samplers, fitting_batch_size
from .model_card import write_model_card
from .network import plain_network, prepare_network
from .publishing import Publisher
from .reference_set import conditions_and_slots, evaluated_conditions
from .reward_functions import RewardFunction, RewardFunctions
from .run_record import RunRecord, describe_run, is_evaluation, write_record
from .sharding import is_split, without_weights
from .sizing import misleading_sets, show_messages
from .stopping import Interrupted, StopOnSignal, leave

logger = get_logger(__name__)

# Values between two logs are averaged, but for these
_REDUCTIONS: dict[str, Any] = {"skipped_updates": sum, "ratio/min": min, "ratio/max": max, "reward_best": max}

_REMEDY = "lower the learning rate or noise_level, then resume from the last checkpoint"


class DiffusionTrainer(_BaseTrainer):
    """Base of the trainers. A subclass defines `training_step`, and sets `steps_per_epoch` before `__init__`."""

    loss_is_scaled_for_ga = True  # an update's losses are weighted before they are returned
    _paper = {"title": "Optimizing Visual Generative Models via Distribution-wise Rewards", "id": "2607.02291"}

    args: DiffusionTrainerConfig
    control: TrainerControl
    steps_per_epoch: int  # optimizer steps that count as an epoch
    identity: State  # of the run, on the process that writes; see `resuming`
    trained_in: Path | None = None  # output folder of the last run, on that process

    def __init__(
        self,
        model: Model,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionTrainerConfig,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows | None = None,
        eval_metrics: Mapping[str, ImageMetric | RewardFunction] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        channels = {} if args.guidance_channels is None else {"guidance_channels": args.guidance_channels}
        self.policy = as_policy(model, args.guidance_scale, **channels)
        args.bind(self.policy)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        given = {name: as_metric(name, metric) for name, metric in (eval_metrics or {}).items()}
        self.eval_metrics = self.rewards.metrics() | given
        train_dataset = as_rows(train_dataset, args.reference_set_size)
        self.conditions, self.slot_sampler = conditions_and_slots(self.policy, train_dataset, args)
        if eval_dataset is None and self.policy.num_conditions is None:
            eval_dataset = train_dataset
        self.eval_sets = evaluated_conditions(self.policy, eval_dataset, args, args.reference_set_size)
        self.run_record, self.num_images = RunRecord(), 0
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._without_update, self._holds_best, self.skipped_in_a_row = False, False, 0
        self.stop = StopOnSignal()
        self.publisher = Publisher(self)
        network = self.prepare_network(plain_network(self.policy), args, peft_config)
        self.skeleton = without_weights(network)
        super().__init__(
            model=network,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            # evaluation makes its own images; transformers only asks that there is a dataset
            eval_dataset=eval_dataset if eval_dataset is not None else [],
            callbacks=[UpdateWeights(self), self.stop, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.rewards.read_columns(self, train_dataset)
        self.state.epoch, self.state.max_steps = 0.0, max(args.max_steps, 1)  # rewards are tried, and may read them
        add_default_callbacks(self)
        check_launch(self)
        for part in (self.policy, self.rewards, *self.eval_metrics.values()):
            if hasattr(part, "to"):
                part.to(self.accelerator.device)
        decay = getattr(args, "ema_decay", 0.0)
        self.ema = PolicyEMA(self.network, decay) if decay > 0 else None
        check_rewards_and_metrics(self)
        show_messages(args)
        for warning in misleading_sets(self):
            logger.warning(warning)

    def prepare_network(
        self, network: nn.Module, args: DiffusionTrainerConfig, peft_config: PeftConfig | None
    ) -> nn.Module:
        """Makes the module that is trained, before processes share it."""
        return prepare_network(network, args, peft_config)

    # ---- networks ----

    @property
    def network(self) -> nn.Module:
        """The trained network without distributed or compiled wrappers."""
        return self.unwrapped(self.model)

    def unwrapped(self, model: nn.Module) -> nn.Module:
        # With keep_torch_compile, accelerate would take DDP out of the compiled wrapper for good.
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def sampled_model(self) -> nn.Module:
        """The network that generates images, wrapped as in training."""
        return self.model_wrapped

    def evaluation_weights(self) -> AbstractContextManager:
        """Puts the weights in place that are evaluated and saved: the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.swapped_in(self.network)

    def autocast(self) -> AbstractContextManager:
        """The context that the network runs in, in rollouts as in training; transitions stay in float32."""
        if self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16):  # the weights are in half precision
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            return torch.autocast(self.accelerator.device.type, dtype)
        return self.accelerator.autocast()

    @cached_property
    def fitting_batch_size(self) -> int:
        return fitting_batch_size(self)

    @property
    def eval_batch_size(self) -> int:
        """Images at a time in reference sets, evaluations and merges."""
        return self.args.per_device_eval_batch_size or self.fitting_batch_size

    # ---- pacing and logging ----

    def add_callback(self, callback: TrainerCallback) -> None:
        if isinstance(callback, LogSamplesCallback):  # instead of the default one
            self.remove_callback(LogSamplesCallback)
        super().add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> TrainOutput:
        # A checkpoint that is resumed from restores what is reset here. Evaluations of the start are kept.
        evaluations = [] if self.state.global_step else self.run_record.evaluations[-1:]
        self.run_record, self.num_images = RunRecord(evaluations=evaluations), 0
        self._without_update, self._holds_best, self.skipped_in_a_row = False, False, 0
        self._metrics.clear()
        self.rewards.reset()
        started = time.time()
        with resuming.output_folder(self, resume_from_checkpoint) as checkpoint, self.stop:
            try:
                return super().train(checkpoint, **kwargs)
            except Interrupted:
                return leave(self, started)
            finally:
                write_record(self)

    @property
    def weights_step(self) -> int:
        """Update that made the present weights: the best one once the best model is loaded, else the last."""
        return self.state.best_global_step if self._holds_best else self.state.global_step

    @property
    def interrupted(self) -> bool:
        """Whether SIGTERM or SIGINT ended the last `train()`, with a checkpoint unless no update was done."""
        return self.stop.stopped

    def get_train_dataloader(self) -> DataLoader:
        """Numbers that pace the steps."""
        return DataLoader(range(self.steps_per_epoch), batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def record(self, name: str, value: float) -> None:
        """Keeps a value for the next log, which writes the mean of most values."""
        self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not is_evaluation(logs):
            logs = logs | {key: _REDUCTIONS.get(key, fmean)(values) for key, values in self._metrics.items()}
            logs["num_images"] = self.num_images
            self._metrics.clear()
        super().log(logs, start_time)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Logs the seconds of a phase, and adds them to the record of the run."""
        before = self.run_record.seconds.get(phase, 0.0)
        with self.run_record.timed(phase):
            yield
        self.record(f"seconds/{phase}", self.run_record.seconds[phase] - before)

    def count_images(self, purpose: str, number: int) -> None:
        """Counts images generated for training."""
        self.num_images += number
        self.run_record.images[purpose] += number

    def describe_run(self) -> State:
        """The content of `run.json`."""
        return describe_run(self)

    def record_rewards(self, total: Tensor, rewards: Sequence[Tensor]) -> None:
        """Keeps mean and spread of an update's rewards, together and by function. Abstentions (NaN) do not count."""
        self.rewards.watch(rewards)
        named = [("reward", "reward_std", total)]
        if len(rewards) > 1:
            each = zip(self.rewards.all, rewards, strict=True)
            named += [(f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std", values) for reward, values in each]
        for mean, std, values in named:
            given = values[~values.isnan()]
            if given.numel():
                self.record(mean, given.mean().item())
            if given.numel() > 1:
                self.record(std, given.std().item())

    # ---- guards ----

    def no_update(self) -> Tensor:
        """Makes this step one without an update: the loss of `training_step`."""
        self._without_update = True
        if self.accelerator.scaler is not None:  # float16's scaler wants gradients to look at
            nothing = sum(p.sum() * 0.0 for p in self.network.parameters() if p.requires_grad)
            self.accelerator.backward(nothing)
        return torch.zeros((), device=self.accelerator.device)

    def skip_update(self, reason: str) -> None:
        """Counts an update that cannot be made. More than `max_skipped_updates` in a row raise `RuntimeError`."""
        self.skipped_in_a_row += 1
        self.record("skipped_updates", 1.0)
        logger.warning(f"Update {self.state.global_step} is skipped: {reason}.")
        if self.skipped_in_a_row > self.args.max_skipped_updates:
            raise RuntimeError(f"{self.skipped_in_a_row} updates in a row were skipped, as {reason}: {_REMEDY}.")

    def skip_equal_rewards(self) -> None:
        """Counts an update that has nothing to learn from."""
        logger.warning("All rewards of this step are equal: there is nothing to learn, the update is skipped.")
        self.record("skipped_updates", 1.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Drops gradients that are not finite before the optimizer sees them."""
        norm, scaler = super()._get_grad_norm(model, grad_norm), self.accelerator.scaler
        if self._without_update:
            self._without_update = False
            model.zero_grad(set_to_none=True)  # with zero gradients, momentum would still move the weights
            return 0.0 if norm is None else norm
        if norm is None or torch.isfinite(torch.as_tensor(norm)):
            self.skipped_in_a_row = 0
        elif self.is_deepspeed_enabled and not self.args.fp16:
            raise RuntimeError(f"the gradient is not finite, and DeepSpeed has already taken the step: {_REMEDY}.")
        elif self.is_deepspeed_enabled or (scaler is not None and scaler.get_scale() >= 1):
            self.record("skipped_updates", 1.0)  # an overflow in float16: the scaler skips the step
        else:
            if scaler is None:
                model.zero_grad(set_to_none=True)
            self.skip_update("the gradient is not finite")
        return norm

    # ---- generation and evaluation ----

    @property
    def num_eval_images(self) -> int:
        """Images of an evaluation under one sampler."""
        return sum(map(len, self.eval_sets.values()))

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: EvalRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        seed: int | None = None,
    ) -> dict[str, float]:
        """
        Generates images under every evaluated sampler, from the noise of `seed`, by default `eval_seed`, and returns
        the metrics: `{prefix}_{sampler}_{metric}`, e.g. `eval_ode_distance_features`, or of a dictionary of datasets
        `{prefix}_{name}_{sampler}_{metric}`. `eval_dataset` holds other conditions than the trainer's.
        """
        started, sets = time.time(), self.eval_sets
        if eval_dataset is not None:
            sets = evaluated_conditions(self.policy, eval_dataset, self.args)
        values = evaluate_samplers(self, sets, self.args.eval_seed if seed is None else seed)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        number = sum(map(len, sets.values()))
        metrics.update(speed_metrics(metric_key_prefix, started, number * len(self.args.eval_schedules)))
        metrics = broadcast_object_list([metrics])[0]  # the best model must be the same on every process
        if eval_dataset is None and seed is None and metric_key_prefix == "eval":
            found = {"step": self.weights_step, "num_images": self.num_images, "values": values}
            self.run_record.evaluations.append(found)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        write_record(self)
        return metrics

    # ---- checkpoints ----

    def write_model(self, folder: Path, adapter_alone: bool = False) -> None:
        """Writes a pipeline; with PEFT and `adapter_alone` an adapter. All processes call it, the main one writes."""
        checkpointing.write_pipeline(self, folder, adapter_alone)

    def training_state(self) -> State:
        """State beyond what transformers saves. All processes call it."""
        return {"num_images": self.num_images, "run_record": self.run_record.state_dict()}

    def load_training_state(self, state: State) -> None:
        self.num_images = state["num_images"]
        self.run_record.load_state_dict(state["run_record"])

    def process_state(self) -> State:
        """State that differs between processes."""
        return {}

    def load_process_state(self, state: State) -> None:
        """Takes back a `process_state`."""

    def load_trained(self, folder: str) -> None:
        """Loads what training goes on with from a checkpoint."""
        checkpointing.load_trained_weights(self, folder)

    def load_best(self, folder: str) -> None:
        """Loads the best model from a checkpoint, into the average as well if there is one."""
        checkpointing.load_pipeline_weights(self, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a pipeline and its card, with PEFT merged and the adapter too. Pushes if `push_to_hub` is set."""
        self.write_model(Path(output_dir or self.args.output_dir))
        if not _internal_call:
            self.create_model_card(folder=output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Saves the pipeline and its card, and pushes them as one commit. All processes call it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(self.args.hub_token if token is None else token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        return self.publisher.push(commit_message, blocking, token=token, revision=revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` with settings and evaluations, see [`~transformers.Trainer.create_model_card`]."""
        if self.is_world_process_zero():
            write_model_card(self, *args, **kwargs)

    def card_parts(self) -> tuple[Mapping[str, object], list[str]]:
        """Further metadata of the model card, see [`~huggingface_hub.ModelCardData`], and sections in Markdown."""
        return {}, []

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        with_retries(lambda: super(DiffusionTrainer, self).init_hf_repo(token, private), f"creating {name}", name)

    # ---- private names of transformers ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.ema is not None and is_split(self.network):
            self.ema.share_out(self.network)
        if resume_from_checkpoint is not None:
            self.state.compute_steps(self.args, max_steps)  # Trainer goes on with the checkpoint's
            self.load_training_state(checkpointing.read_training_state(self, resume_from_checkpoint))
            checkpointing.find_best(self, Path(resume_from_checkpoint).parent)
            if (own := checkpointing.read_process_state(self, resume_from_checkpoint)) is not None:
                self.load_process_state(own)
        return prepared

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        if self.state.global_step >= self.state.max_steps:  # a run that had ended: Trainer would make one more update
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: object, **kwargs: object) -> TrainOutput:
        asked = self.args
        if self.interrupted:
            # Trainer would load the best model, and with save_total_limit=1 delete the checkpoint to resume from.
            self.args = copy.copy(asked)
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        output = super()._finalize_training(*args, **kwargs)
        self.args = asked
        return output

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        with self.run_record.timed("checkpoints"):
            written = checkpointing.write_checkpoint(self, run_dir)
        if self.args.push_to_hub:
            self.publisher.push_checkpoint(written)
        if self.args.should_save and self.args.save_total_limit is not None:
            self.publisher.finish()  # a folder must not go while it is being uploaded
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)
        write_record(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_trained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._holds_best = True
        if self.is_deepspeed_enabled:  # its optimizer holds the weights
            super()._load_best_model()
        else:
            self.load_best(str(resuming.newest_whole([Path(str(self.state.best_model_checkpoint))])))

    def _finish_current_push(self) -> None:
        self.publisher.finish()

    def _send_telemetry(self) -> None:
        """Sends nothing: TRL's telemetry reads a language model's config."""
