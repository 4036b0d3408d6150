# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""What any trainer of a diffusion policy needs of TRL's base trainer: the one place that touches TRL's private names.

`transformers.Trainer` takes the network for a language model: it writes to its config, saves a bare state dict, pushes
a config without weights, warns instead of loading the best model. Every such expectation is met or overridden here.
"""

import copy
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    get_last_checkpoint,
    rotate_checkpoints,
    speed_metrics,
)
from trl.trainer.base_trainer import _BaseTrainer

from ..generation import SamplingSchedule, conditions_of_slots, image_generators, sample, take
from ..metrics.report import ImageMetric
from ..policies import DiffusionPolicy, to_uint8
from .callbacks import StopOnSIGTERM, UpdateEMA
from .ema import PolicyEMA
from .model_card import build_model_card, recipe_of

logger = get_logger(__name__)

ADAPTER_FOLDER = "adapter"
# The names diffusers gives to attention projections, adapted by default
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
RAW_WEIGHTS = "trained_weights.safetensors"
TRAINING_STATE = "diffusion_state.pt"
PROCESS_STATE = "process_state_{}.pt"
# Not a name that a checkpoint has, nor one that is pushed to the Hub.
PARTIAL_CHECKPOINT = "_partial-checkpoint"
# Files of a checkpoint that are for resuming only, and stay off the Hub.
_RESUME_ONLY = [
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    RAW_WEIGHTS,
    "process_state*",
]


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

    A policy must predict the same in rollout and replay: with label dropout on, on-policy ratios leave 1 by 0.1 and
    more, a thousand times the clip range.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        for name in ("dropout_prob", "class_dropout_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
        if isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0


class DiffusionTrainer(_BaseTrainer):
    """
    Base of the trainers of a [`DiffusionPolicy`]: preparation, pacing, logging, evaluation, saving and loading.

    Args:
        policy ([`DiffusionPolicy`]): what is trained.
        args ([`~transformers.TrainingArguments`]): arguments.
        steps_per_epoch (`int`): optimizer steps that count as an epoch.
        eval_conditions: one per evaluated image.
        eval_metrics (`dict[str, ImageMetric]`): metrics of the evaluated images.
        ema_decay (`float`): decay of the average of the weights; 0 keeps none.
        peft_config ([`~peft.PeftConfig`], *optional*): trains an adapter in place of the network's own weights.
        train_dataset, eval_dataset, callbacks, optimizers: as in [`~transformers.Trainer`].
    """

    # Losses are weighted over the whole update before they are returned.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        args: Any,
        steps_per_epoch: int,
        eval_conditions: Any,
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
        self.eval_conditions = eval_conditions
        self.eval_metrics = eval_metrics
        self.ema: PolicyEMA | None = None
        self.control: Any
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._uploads: list[Future] = []
        self._skipped_in_a_row = 0
        self._stop_on_sigterm = StopOnSIGTERM()
        super().__init__(
            model=self._prepare_network(policy.model, args, peft_config),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            # evaluation generates its own images; transformers only asks that something be there
            eval_dataset=eval_dataset if eval_dataset is not None else [],
            callbacks=[UpdateEMA(self), self._stop_on_sigterm, *(callbacks or [])],
            optimizers=optimizers,
        )
        self._check_launch()
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
            # Trainer would call a method that diffusers' models do not have
            args.activation_checkpointing = args.gradient_checkpointing = False
        if hasattr(network, "_internal_dict"):
            network._internal_dict = _NetworkConfig(network._internal_dict)
        if peft_config is not None:
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
        disable_dropout(network)  # the adapter's own as well
        return network

    def _check_launch(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed are not supported yet: launch with multi-GPU data parallelism, and lower memory "
                "with peft_config, activation_checkpointing, per_device_train_batch_size or offload_trajectories."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, which Trainer would drive with DataParallel and without "
                f"autocast: start one process per GPU, e.g. torchrun --nproc_per_node {self.args.n_gpu}, or set "
                "CUDA_VISIBLE_DEVICES to one."
            )
        if self.accelerator.device.type == "mps":
            raise ValueError("distances need float64, which the MPS device has not: set use_cpu=True.")

    # ---- the network ----

    @property
    def network(self) -> nn.Module:
        """The trained network without distributed wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The weights that are evaluated and saved: the average where there is one."""
        with self.ema.swapped_in(self.network) if self.ema is not None else nullcontext():
            yield

    # ---- pacing and logging ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._stop_on_sigterm.restore()

    def get_train_dataloader(self) -> DataLoader:
        """Numbers that pace the steps; no state rides on their order."""
        return DataLoader(range(self.steps_per_epoch), batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def _send_telemetry(self) -> None:
        """Sends nothing: TRL's telemetry reads a language model's config."""

    def record(self, name: str, value: float) -> None:
        """Keeps a value for the next log, where the mean of those kept is written."""
        self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(key.startswith("eval_") for key in logs):
            logs = {**logs, **{key: sum(values) / len(values) for key, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no per-example predictions: use evaluate().")

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.record(f"seconds/{phase}", time.perf_counter() - started)

    # ---- guards ----

    def skip_update(self, reason: str, **context: Any) -> None:
        """
        Counts an update that cannot be made, and keeps what is needed to look into it.

        Raises:
            RuntimeError: more than `max_skipped_updates` in a row.
        """
        self._skipped_in_a_row += 1
        self.record("skipped_updates", 1.0)
        step, limit = self.state.global_step, self.args.max_skipped_updates
        path = os.path.join(self.args.output_dir, "skipped", f"step-{step}.pt")
        if self.accelerator.is_main_process:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.save({"step": step, "reason": reason, "seed": self.args.seed, **context}, path)
        logger.warning(f"Update {step} is skipped: {reason}. Its context is in {path}.")
        if self._skipped_in_a_row > limit:
            last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
            remedy = f"resume from {last}" if last else "start again"
            raise RuntimeError(
                f"{self._skipped_in_a_row} updates in a row were skipped (max_skipped_updates={limit}), the last "
                f"because {reason}: lower the learning rate or noise_level, then {remedy}."
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Drops gradients that are not finite before the optimizer sees them; they are so on every process."""
        norm = super()._get_grad_norm(model, grad_norm)
        if torch.isfinite(torch.as_tensor(norm)):
            if any(p.grad is not None for p in model.parameters()):
                self._skipped_in_a_row = 0
        elif self.accelerator.scaler is None:  # float16's scaler skips such steps by itself, and lowers its scale
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
            last batch is filled up with its last image. Last, which of this process's samples are finite: a black
            image would not tell.
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
                with self.accelerator.autocast():  # the network only: decoding and features stay in full precision
                    x = sample(self.policy, model, batch, schedule, generators).sample
                finite = x.flatten(1).isfinite().all(dim=1)
                yield to_uint8(self.policy.decode(x)), batch, valid, finite
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
        training, model = self.model.training, self.model_wrapped
        model.eval()
        metrics: dict[str, float] = {}
        try:
            with self.evaluation_weights():
                for sampler, schedule in self.args.eval_schedules.items():
                    values = self._evaluate_sampler(model, conditions, schedule, seed, f"Evaluation, {sampler}")
                    metrics.update({f"{metric_key_prefix}_{sampler}_{name}": v for name, v in values.items()})
        finally:
            model.train(training)
        number = len(conditions) * len(self.args.eval_schedules)
        elapsed = time.perf_counter() - started
        metrics.update(speed_metrics(metric_key_prefix, time.time() - elapsed, num_samples=number))
        metrics = broadcast_object_list([metrics])[0]  # what is best must be so on every process
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
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
        return {name: float(metric.compute()) for name, metric in self.eval_metrics.items()}

    def _gather_conditions(self, conditions: Any) -> Any:
        if isinstance(conditions, Tensor):
            return self.accelerator.gather(conditions.to(self.accelerator.device))
        return gather_object(conditions)

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes a pipeline that loads with `from_pretrained`; with PEFT, the merged one and the adapter beside it."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        network = self.network
        with self.evaluation_weights():
            if isinstance(network, PeftModel):
                network.save_pretrained(os.path.join(output_dir, ADAPTER_FOLDER))
                self.policy.save_pretrained(output_dir, model=copy.deepcopy(network).merge_and_unload())
            else:
                self.policy.save_pretrained(output_dir)
        # not transformers' training_args.bin: a pickle, with the Hub token in plain text
        Path(output_dir, "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Writes a checkpoint under another name and renames it when it is whole.

        Killed at any moment, a run therefore has only whole folders named `checkpoint-*`, and
        `resume_from_checkpoint=True` finds the newest of them.
        """
        self.create_model_card(model_name=self._hub_name())
        run_dir = Path(self._get_output_dir(trial=trial))
        final, partial = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", run_dir / PARTIAL_CHECKPOINT
        writes = self.args.should_save
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(partial, final, run_dir)
        except (OSError, SafetensorError) as error:
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            error.add_note(
                f"The checkpoint of step {self.state.global_step} could not be written to {run_dir}; earlier ones are "
                "intact. Free space or lower save_total_limit, then resume with resume_from_checkpoint=True."
            )
            raise
        self.accelerator.wait_for_everyone()
        if writes:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if writes:
            if self.args.save_total_limit is not None:
                self._finish_current_push()  # a folder must not go while it is being uploaded
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _write_checkpoint(self, partial: Path, final: Path, run_dir: Path) -> None:
        """What transformers writes, and in the same files."""
        self.store_flos()
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    name, saved = type(callback).__name__, self.state.stateful_callbacks
                    if isinstance(saved[name], list):
                        saved[name].append(callback.state())
                    else:
                        saved[name] = callback.state()
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    def training_state(self) -> dict[str, Any]:
        """State of this trainer beyond what transformers saves; subclasses add theirs."""
        return {"ema": self.ema.state_dict() if self.ema is not None else None}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])

    def process_state(self) -> dict[str, Any]:
        """State that differs between processes; subclasses add theirs."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Takes back what `process_state` gave."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            if self.ema is not None:  # the pipeline holds the average: keep what the optimizer belongs to
                parameters = ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
                raw = {name: p.detach().contiguous().cpu() for name, p in parameters}
                save_file(raw, os.path.join(output_dir, RAW_WEIGHTS))
            torch.save(self.training_state(), os.path.join(output_dir, TRAINING_STATE))
        own = self.process_state()
        if own:
            torch.save(own, os.path.join(output_dir, PROCESS_STATE.format(self.args.process_index)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, TRAINING_STATE)
        if self._found_by_all(path):
            self.load_training_state(torch.load(path, map_location=self.accelerator.device, weights_only=True))
        path = os.path.join(checkpoint, PROCESS_STATE.format(self.args.process_index))
        if self._found_by_all(path):
            self.load_process_state(torch.load(path, map_location="cpu", weights_only=True))

    def _found_by_all(self, path: str) -> bool:
        found = torch.tensor([os.path.isfile(path)], device=self.accelerator.device)
        everyone = self.accelerator.gather(found)
        if bool(everyone.any()) and not bool(everyone.all()):
            missing = (~everyone).nonzero().flatten().tolist()
            raise ValueError(
                f"processes {missing} do not find {os.path.basename(path)} in the checkpoint: resume from a folder "
                "that all nodes share, with as many processes as wrote it."
            )
        return bool(everyone.all())

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        raw = os.path.join(resume_from_checkpoint, RAW_WEIGHTS)
        if os.path.isfile(raw):
            trained = load_file(raw)
            known = {name for name, p in self.network.named_parameters() if p.requires_grad}
            if set(trained) != known:
                odd = sorted(set(trained) ^ known)[:3]
                raise ValueError(
                    f"{resume_from_checkpoint} was trained with other parameters, e.g. {odd}: resume with the model "
                    "and peft_config that the run was started with."
                )
            self.network.load_state_dict(trained, strict=False)
        else:
            self._load_weights(resume_from_checkpoint)
        if self.ema is not None:  # now, for what is evaluated or saved before the first step
            self.ema = PolicyEMA(self.network, self.ema.decay)
            path = os.path.join(resume_from_checkpoint, TRAINING_STATE)
            if os.path.isfile(path):
                saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)["ema"]
                if saved is not None:
                    self.ema.load_state_dict(saved)

    def _load_best_model(self) -> None:
        """Loads the pipeline's weights of the best checkpoint, into the average as well where there is one."""
        logger.info(f"Loading the best model from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_weights(self.state.best_model_checkpoint)
        if self.ema is not None:
            self.ema = PolicyEMA(self.network, self.ema.decay)

    def _load_weights(self, folder: str) -> None:
        network = self.network
        if isinstance(network, PeftModel):
            set_peft_model_state_dict(network, load_peft_weights(os.path.join(folder, ADAPTER_FOLDER)))
        else:
            self.policy.load_weights(folder)

    # ---- the Hub ----

    def _hub_name(self) -> str:
        return Path(self.args.hub_model_id or self.args.output_dir).name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the checkpoint's pipeline; transformers would push a config without weights."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and not all(upload.done() for upload in self._uploads):
            return
        uploads = [(".", list(_RESUME_ONLY) + [TRAINING_STATE])]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            uploads.append(("last-checkpoint", []))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            uploads.append((Path(checkpoint_folder).name, []))
        for path_in_repo, ignored in uploads:
            upload = HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=ignored or None,
                run_as_future=True,
            )
            self._uploads.append(upload)

    def _finish_current_push(self) -> None:
        """Waits for the uploads in the background; a failure is told, and the last push has all there is to push."""
        while self._uploads:
            error = self._uploads.pop(0).exception()
            if error is not None:
                logger.error(f"A push during training failed: {error}. Call push_to_hub() to push again.")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Writes `README.md` with the recipe and the last evaluation."""
        if not self.is_world_process_zero():
            return
        given = [tags] if isinstance(tags, str) else list(tags or [])
        source = getattr(getattr(self.policy, "pipeline", None), "config", {}).get("_name_or_path")
        base_model = source if source and source.count("/") == 1 and not os.path.isdir(source) else None
        name = model_name or self._hub_name()
        card = build_model_card(
            name,
            trainer_name=type(self).__name__,
            paper=self._paper,
            log_history=self.state.log_history,
            recipe=recipe_of(self.args),
            num_eval_images=len(self.eval_conditions),
            base_model=base_model,
            license=kwargs.get("license"),
            library_name="diffusers",
            pipeline_tag=self._pipeline_tag,
            datasets=dataset_name,
            tags=sorted({*given, *self._tag_names, "generated_from_trainer"}),
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))

    _pipeline_tag = "unconditional-image-generation"
