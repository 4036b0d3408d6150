# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Saving and resuming: a checkpoint is a pipeline that loads, whole or absent, and resumes exactly.

`transformers.Trainer` would save a bare state dict, with its arguments as a pickle that has the token in it, and warn
instead of loading the best model.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    rotate_checkpoints,
)
from trl.trainer.base_trainer import _BaseTrainer

from ..files import written_whole
from ..hub import without_tokens
from ..policies import DiffusionPolicy
from .ema import PolicyEMA
from .run_record import RUN_RECORD, RunRecord, describe_config, device_name, is_evaluation, now, versions
from .sharding import is_split, load_whole_state_dict, reshard, whole, whole_state_dict

logger = get_logger(__name__)

ADAPTER_FOLDER = "adapter"
RAW_WEIGHTS = "trained_weights.safetensors"
TRAINING_STATE = "diffusion_state.pt"
PROCESS_STATE = "process_state_{}.pt"
# Not a name that a checkpoint has, nor one that is pushed to the Hub.
PARTIAL_CHECKPOINT = "_partial-checkpoint"
HALF_PRECISION = (torch.float16, torch.bfloat16)


class CheckpointingTrainer(_BaseTrainer):
    """
    TRL's base trainer, saving and loading pipelines in place of language models.

    A subclass sets `policy`, `ema`, `eval_conditions`, `eval_metrics`, `num_images`, `run_record`, and `_skeleton`,
    the network without its weights as it was before processes shared it out.
    """

    policy: DiffusionPolicy
    ema: PolicyEMA | None
    eval_conditions: Any
    eval_metrics: dict[str, Any]
    num_images: int
    run_record: RunRecord
    _skeleton: nn.Module
    # what one may do with a checkpoint that cannot be resumed from
    _start_anew = "start a new run from it, as its model: {}"

    @property
    def network(self) -> nn.Module:
        """The trained network without distributed or compiled wrappers."""
        return self.unwrapped(self.model)

    def unwrapped(self, model: nn.Module) -> nn.Module:
        # kept, accelerate would take DDP out of the compiled wrapper for good: gradients would no longer be shared
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The weights that are evaluated and saved: the average where there is one."""
        with self.ema.swapped_in(self.network) if self.ema is not None else nullcontext():
            yield

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Writes a pipeline that loads with `from_pretrained`; with PEFT, the merged one and the adapter beside it.

        All processes call it, the main one writes. Pushes to the Hub afterwards if `push_to_hub` is set.
        """
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        with self.evaluation_weights():
            network = self._whole_network()
            if network is None or not self.args.should_save:
                return
            os.makedirs(output_dir, exist_ok=True)
            if isinstance(network, PeftModel):
                save_adapter = getattr(
                    self.policy, "save_adapter", lambda path, adapted: adapted.save_pretrained(path)
                )
                save_adapter(os.path.join(output_dir, ADAPTER_FOLDER), network)
                network = self._merged(network)
            self.policy.save_pretrained(output_dir, model=network)
        # not transformers' training_args.bin: a pickle, with the Hub token in plain text
        Path(output_dir, "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _whole_network(self) -> nn.Module | None:
        """The network as it was before processes shared it out, with its weights of now, where it is to be saved."""
        if not is_split(self.network):
            return self.network
        weights = whole_state_dict(self.network, keep=self.args.should_save)
        if not self.args.should_save:
            return None
        network = copy.deepcopy(self._skeleton)
        if self.is_deepspeed_enabled:  # which rounds buffers to half precision with the weights
            weights |= {name: value for name, value in network.state_dict().items() if not value.is_meta}
        network.load_state_dict(weights, assign=True)
        return network

    def _merged(self, network: PeftModel) -> nn.Module:
        """With its adapter merged, in float32, as half precision would round small changes away; in CPU memory."""
        if getattr(network, "hf_quantizer", None) is not None:  # its layers know themselves how to merge
            return copy.deepcopy(network).merge_and_unload()
        weights = {}
        for name, value in network.state_dict().items():
            dtype = torch.float32 if value.dtype in HALF_PRECISION else value.dtype
            weights[name] = value.detach().to("cpu", dtype, copy=True)  # merging writes into them
        merged = copy.deepcopy(self._skeleton)
        merged.load_state_dict(weights, assign=True)
        return merged.merge_and_unload()  # type: ignore[operator]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Writes a checkpoint under another name and renames it when it is whole.

        Killed at any moment, a run therefore has only whole folders named `checkpoint-*`, and
        `resume_from_checkpoint=True` finds the newest of them.
        """
        with self.run_record.timed("checkpoints"):
            self._save_whole_checkpoint(trial)
        self.write_record()

    def _save_whole_checkpoint(self, trial: Any) -> None:
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would save the weights once more, which the pipeline and the raw weights already hold
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def training_state(self) -> dict[str, Any]:
        """State of this trainer beyond what transformers saves; subclasses add theirs. Called on all processes."""
        return {
            "ema": self.ema.state_dict(keep=self.args.should_save) if self.ema is not None else None,
            "num_images": self.num_images,
            "run_record": self.run_record.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Takes back what `training_state` gave; the average comes back with the weights it belongs to."""
        self.num_images = state.get("num_images", self.num_images)  # version 0.1.0 kept it of merges alone
        if "run_record" in state:
            self.run_record.load_state_dict(state["run_record"])

    def read_training_state(self, folder: str) -> dict[str, Any]:
        """
        What `training_state` gave when the checkpoint in `folder` was written.

        Raises:
            FileNotFoundError: it was written with `save_only_model=True`.
        """
        return torch.load(self._find_training_state(folder), map_location="cpu", weights_only=True)

    def _find_training_state(self, folder: str) -> str:
        path = os.path.join(folder, TRAINING_STATE)
        if not self._found_by_all(path):
            raise FileNotFoundError(
                f"{folder} has no {TRAINING_STATE}: checkpoints saved with save_only_model=True hold the model alone. "
                f"Resume from one saved without it, or {self._start_anew.format(folder)}."
            )
        return path

    def process_state(self) -> dict[str, Any]:
        """State that differs between processes; subclasses add theirs."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Takes back what `process_state` gave."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state, raw = self.training_state(), {}
        if self.ema is not None:  # the pipeline holds the average: keep what the optimizer belongs to
            reshard(self.network)
            parameters = ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
            wholes = ((name, whole(p)) for name, p in parameters)
            raw = {name: p.detach().contiguous().cpu() for name, p in wholes if self.args.should_save}
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, TRAINING_STATE))
            if raw:
                save_file(raw, os.path.join(output_dir, RAW_WEIGHTS))
        own = self.process_state()
        if own:
            torch.save(own, os.path.join(output_dir, PROCESS_STATE.format(self.args.process_index)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self.load_training_state(self.read_training_state(checkpoint))
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

    # ---- the record of the run ----

    def write_record(self) -> None:
        """Writes `run.json`, which `trl-distreward report` reads, once there was an update."""
        if not (self.run_record.live and self.is_world_process_zero()):
            return
        path = Path(self.args.output_dir, RUN_RECORD)
        try:
            with self.run_record.writing(), written_whole(path, "w") as file:
                file.write(without_tokens(json.dumps(self._describe_run(), indent=1, default=str)) + "\n")
        except OSError as error:  # no reason to end a run
            logger.warning(f"{path} could not be written, and stays as it was: {error}.")

    def _describe_run(self) -> dict[str, Any]:
        """What the record holds; subclasses add theirs."""
        pipeline = getattr(self.policy, "pipeline", None)
        parameters = list(self._skeleton.parameters())
        logs = [entry for entry in self.state.log_history if not is_evaluation(entry)]
        return {
            "trainer": type(self).__name__,
            "paper": self._paper,
            "updated": now(),
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "model": {
                "source": getattr(pipeline, "config", {}).get("_name_or_path"),
                "pipeline": type(pipeline if pipeline is not None else self.policy).__name__,
                "network": type(self.policy.model).__name__,
                "parameters": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "num_eval_images": len(self.eval_conditions),
            "eval_schedules": list(self.args.eval_schedules),
            "higher_is_better": {
                name: getattr(metric, "higher_is_better", None) for name, metric in self.eval_metrics.items()
            },
            "device": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "versions": versions(),
            "config": describe_config(self.args),
            "num_images": self.num_images,
            **self.run_record.state_dict(),
            "log_history": logs,
        }

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._find_training_state(resume_from_checkpoint)  # before anything is loaded
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
            load_whole_state_dict(self.network, trained, strict=False)
        else:
            self._load_weights(resume_from_checkpoint)
        if self.ema is not None:  # now, for what is evaluated or saved before the first step
            self.ema = PolicyEMA(self.network, self.ema.decay)
            saved = self.read_training_state(resume_from_checkpoint)["ema"]
            if saved is not None:
                self.ema.load_state_dict(saved)

    def _load_best_model(self) -> None:
        """Loads the pipeline's weights of the best checkpoint, into the average as well where there is one."""
        if self.is_deepspeed_enabled:  # its optimizer holds the weights
            super()._load_best_model()
            return
        logger.info(f"Loading the best model from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_weights(self.state.best_model_checkpoint)
        if self.ema is not None:
            self.ema = PolicyEMA(self.network, self.ema.decay)

    def _load_weights(self, folder: str) -> None:
        if isinstance(self.network, PeftModel):
            # through the skeleton, where names become those of the network's parameters
            adapted = copy.deepcopy(self._skeleton)
            trained = {n: torch.full(p.shape, torch.nan) for n, p in adapted.named_parameters() if p.requires_grad}
            adapted.load_state_dict(trained, strict=False, assign=True)
            saved = load_peft_weights(os.path.join(folder, ADAPTER_FOLDER), device="cpu")
            set_peft_model_state_dict(adapted, saved)
            missing = [name for name, value in trained.items() if value.isnan().any()]
            if missing:
                raise ValueError(
                    f"the adapter in {folder} lacks {len(missing)} trained parameters, e.g. {missing[0]}: resume with "
                    "the peft_config that the run was started with."
                )
            load_whole_state_dict(self.network, trained, strict=False)
        else:
            try:
                load_whole_state_dict(self.network, self.policy.read_weights(folder))
            except RuntimeError as error:
                raise ValueError(
                    f"the weights in {folder} do not fit the network: resume with the model and peft_config that the "
                    f"run was started with. {error}"
                ) from error
