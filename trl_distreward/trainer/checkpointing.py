# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints: each is a pipeline that loads, or an adapter of one, is written whole or not at all, and resumes exactly.

`transformers.Trainer` would save a bare state dict, and its arguments as a pickle that contains the Hub token.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..conversion.restricted_pickle import check_sharded_state
from ..files import State
from ..merging.adapters import ADAPTER_FOLDER
from ..saving import saved_whole
from .ema import PolicyEMA
from .resuming import write_manifest
from .run_record import save_state
from .sharding import is_split, load_whole_state_dict, reshard, whole, whole_state_dict, whole_tensors

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

RAW_WEIGHTS = "trained_weights.safetensors"
TRAINING_STATE = "diffusion_state.pt"
PROCESS_STATE = "process_state_{}.pt"
PARTIAL_CHECKPOINT = "_partial-checkpoint"  # names with an underscore are not pushed to the Hub


# ---- writing ----


def write_checkpoint(trainer: "DiffusionTrainer", run_dir: Path) -> Path:
    """Writes a checkpoint and renames it once it is whole: a killed run leaves no half one. All processes call it."""
    final, partial = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}", run_dir / PARTIAL_CHECKPOINT
    writes = trainer.args.should_save
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.create_model_card()
        _write_into(trainer, partial)
        trainer.accelerator.wait_for_everyone()
        if writes:
            write_manifest(trainer, partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError where a disk is full
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        remedy = "earlier checkpoints are whole: make room, or the folder writable, and resume from the newest"
        raise OSError(f"{final} cannot be written: {remedy}. The error was: {error}") from error
    trainer.accelerator.wait_for_everyone()
    find_best(trainer, run_dir)
    return final


def _write_into(trainer: "DiffusionTrainer", folder: Path) -> None:
    state, writes = trainer.state, trainer.args.should_save
    trainer.write_model(folder, adapter_alone=True)
    if not trainer.args.save_only_model:
        if trainer.is_fsdp_enabled:  # without the weights, which transformers would write once more
            plugin = trainer.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder))
            if writes:
                torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        else:
            trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))
        _write_training_state(trainer, folder)
    if writes:
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        save_state(state, folder)


def _write_training_state(trainer: "DiffusionTrainer", folder: Path) -> None:
    state = trainer.stop.state_before or trainer.training_state()  # an update that was left halfway is dropped
    writes, network = trainer.args.should_save, trainer.network
    state["estimator"] = whole_tensors(state.get("estimator", {}), keep=writes)
    state["ema"] = None if trainer.ema is None else trainer.ema.state_dict(keep=writes)
    if trainer.ema is not None:  # the pipeline holds the average: keep the weights that the optimizer works on
        reshard(network)
        wholes = ((name, whole(p)) for name, p in network.named_parameters() if p.requires_grad)
        raw = {name: p.detach().contiguous().cpu() for name, p in wholes if writes}
        if writes:
            save_file(raw, folder / RAW_WEIGHTS)
    if writes:
        torch.save(state, folder / TRAINING_STATE)
    own = trainer.process_state()
    if own:
        torch.save(own, folder / PROCESS_STATE.format(trainer.args.process_index))


def write_pipeline(trainer: "DiffusionTrainer", folder: Path, adapter_alone: bool) -> None:
    """Writes the pipeline with the weights to evaluate; with PEFT the adapter, and only that if `adapter_alone`."""
    with trainer.evaluation_weights():
        network = _whole_network(trainer)
        if not trainer.args.should_save:
            return
        with saved_whole(folder) as whole_folder:
            # not transformers' training_args.bin: a pickle with the Hub token in plain text
            (whole_folder / "training_args.json").write_text(trainer.args.to_json_string() + "\n")
            if isinstance(network, PeftModel):
                save = getattr(trainer.policy, "save_adapter", lambda path, adapted: adapted.save_pretrained(path))
                save(os.path.join(whole_folder, ADAPTER_FOLDER), network)
                if adapter_alone or getattr(network, "hf_quantizer", None) is not None:  # merged, it would be rounded
                    return
                network = _merged(trainer, network)
            trainer.policy.save_pretrained(whole_folder, model=network)


def _whole_network(trainer: "DiffusionTrainer") -> nn.Module:
    """The network as it was before processes split it; with its present weights where it is saved."""
    if not is_split(trainer.network):
        return trainer.network
    weights = whole_state_dict(trainer.network, keep=trainer.args.should_save)
    network = copy.deepcopy(trainer.skeleton)
    if trainer.is_deepspeed_enabled:  # which rounds buffers to half precision
        weights |= {name: value for name, value in network.state_dict().items() if not value.is_meta}
    network.load_state_dict(weights, strict=trainer.args.should_save, assign=True)
    return network


def _merged(trainer: "DiffusionTrainer", network: PeftModel) -> nn.Module:
    """Merges the adapter in CPU memory, in float32: half precision would round small changes away."""
    weights = {}
    for name, value in network.state_dict().items():
        dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        weights[name] = value.detach().to("cpu", dtype, copy=True)  # merging writes into them
    merged = copy.deepcopy(trainer.skeleton)
    merged.load_state_dict(weights, assign=True)
    return merged.merge_and_unload()  # type: ignore[operator]


# ---- reading ----


def read_training_state(trainer: "DiffusionTrainer", folder: str) -> State:
    """Reads what `training_state` returned when the checkpoint was written."""
    for part in Path(folder).glob("*/"):
        check_sharded_state(part)
    state = _read(trainer, folder, TRAINING_STATE)
    if state is None:
        remedy = "resume from one made without save_only_model=True, or start a new run with this folder as its model"
        raise FileNotFoundError(f"{folder} has no {TRAINING_STATE}: {remedy}.")
    return state


def find_best(trainer: "DiffusionTrainer", run_dir: Path) -> None:
    """Finds the checkpoint of the best model so far."""
    state = trainer.state
    best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.is_dir():
        state.best_model_checkpoint = str(best)
    elif state.best_global_step and state.best_model_checkpoint is None and trainer.args.load_best_model_at_end:
        logger.warning(f"The model was best at {best}, which is not there: unless a better one comes, the last stays.")


def read_process_state(trainer: "DiffusionTrainer", folder: str) -> State | None:
    """Reads this process's own state, if the checkpoint has one."""
    return _read(trainer, folder, PROCESS_STATE.format(trainer.args.process_index))


def _read(trainer: "DiffusionTrainer", folder: str, name: str) -> State | None:
    path = os.path.join(folder, name)
    found = torch.tensor([os.path.isfile(path)], device=trainer.accelerator.device)
    everyone = trainer.accelerator.gather(found)
    if not everyone.any():
        return None
    if not everyone.all():
        missing = f"processes {(~everyone).nonzero().flatten().tolist()} do not find {name}"
        raise ValueError(f"{missing}: resume from a shared folder, on as many processes as wrote it.")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_trained_weights(trainer: "DiffusionTrainer", folder: str) -> None:
    """Loads the weights that training goes on with, and the average beside them."""
    state, raw = read_training_state(trainer, folder), os.path.join(folder, RAW_WEIGHTS)
    if not os.path.isfile(raw):
        load_pipeline_weights(trainer, folder)
        return
    load_whole_state_dict(trainer.network, load_file(raw), strict=False)
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])


def load_pipeline_weights(trainer: "DiffusionTrainer", folder: str) -> None:
    """Loads the network's weights, or its adapter's, from a saved pipeline; the average starts at them."""
    if not isinstance(trainer.network, PeftModel):
        load_whole_state_dict(trainer.network, trainer.policy.read_weights(folder))
    else:
        # The skeleton translates peft's names of the weights into those of the network's parameters.
        adapted = copy.deepcopy(trainer.skeleton)
        trained = {n: torch.full(p.shape, torch.nan) for n, p in adapted.named_parameters() if p.requires_grad}
        adapted.load_state_dict(trained, strict=False, assign=True)
        set_peft_model_state_dict(adapted, load_peft_weights(os.path.join(folder, ADAPTER_FOLDER), device="cpu"))
        missing = [name for name, value in trained.items() if value.isnan().any()]
        if missing:
            raise ValueError(f"the adapter in {folder} lacks {missing[0]}: resume with the run's peft_config.")
        load_whole_state_dict(trainer.network, trained, strict=False)
    if trainer.ema is not None:
        trainer.ema = PolicyEMA(trainer.network, trainer.ema.decay)
