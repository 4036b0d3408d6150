# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints: each is a pipeline that loads, is written whole or not at all, and resumes exactly.

`transformers.Trainer` would save a bare state dict, and its arguments as a pickle that contains the Hub token. The
functions here work with these members of a trainer: `policy`, `network`, `ema`, `skeleton` (the network without its
weights, as it was before processes split it), `training_state()`, `process_state()`, their two `load_…` counterparts,
and `write_model(folder)`.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .ema import PolicyEMA
from .sharding import is_split, load_whole_state_dict, reshard, whole, whole_state_dict

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

ADAPTER_FOLDER = "adapter"
RAW_WEIGHTS = "trained_weights.safetensors"
TRAINING_STATE = "diffusion_state.pt"
PROCESS_STATE = "process_state_{}.pt"
# A name that no checkpoint has, and that is not pushed to the Hub
PARTIAL_CHECKPOINT = "_partial-checkpoint"
HALF_PRECISION = (torch.float16, torch.bfloat16)


# ---- writing ----


def write_checkpoint(trainer: "DiffusionTrainer", run_dir: Path) -> Path:
    """
    Writes a checkpoint under another name and renames it once it is whole, so that every folder named `checkpoint-*`
    is whole even if the run is killed. All processes call it.
    """
    final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    partial, writes = run_dir / PARTIAL_CHECKPOINT, trainer.args.should_save
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        _write_into(trainer, partial, final)
    except (OSError, SafetensorError) as error:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        error.add_note(
            f"The checkpoint of step {trainer.state.global_step} could not be written to {run_dir}; earlier ones are "
            "intact. Free space or lower save_total_limit, then resume with resume_from_checkpoint=True."
        )
        raise
    trainer.accelerator.wait_for_everyone()
    if writes:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    trainer.accelerator.wait_for_everyone()
    return final


def _write_into(trainer: "DiffusionTrainer", folder: Path, final: Path) -> None:
    state = trainer.state
    trainer.write_model(folder)
    if not trainer.args.save_only_model:
        if trainer.is_fsdp_enabled:
            _write_fsdp_optimizer(trainer, folder)
        else:
            trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))
        _write_training_state(trainer, folder)
    if state.best_global_step:
        best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best == final or best.is_dir():
            state.best_model_checkpoint = str(best)
    if trainer.args.should_save:
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                name, saved = type(callback).__name__, state.stateful_callbacks
                if isinstance(saved[name], list):
                    saved[name].append(callback.state())
                else:
                    saved[name] = callback.state()
        state.save_to_json(str(folder / TRAINER_STATE_NAME))


def _write_fsdp_optimizer(trainer: "DiffusionTrainer", folder: Path) -> None:
    """Writes optimizer and scheduler without the weights, which transformers would write once more."""
    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def _write_training_state(trainer: "DiffusionTrainer", folder: Path) -> None:
    state, raw, network = trainer.training_state(), {}, trainer.network
    writes = trainer.args.should_save
    state["ema"] = None if trainer.ema is None else trainer.ema.state_dict(keep=writes)
    if trainer.ema is not None:  # the pipeline holds the average: keep the weights that the optimizer works on
        reshard(network)
        wholes = ((name, whole(p)) for name, p in network.named_parameters() if p.requires_grad)
        raw = {name: p.detach().contiguous().cpu() for name, p in wholes if writes}
    if writes:
        torch.save(state, folder / TRAINING_STATE)
        if raw:
            save_file(raw, folder / RAW_WEIGHTS)
    own = trainer.process_state()
    if own:
        torch.save(own, folder / PROCESS_STATE.format(trainer.args.process_index))


def write_pipeline(trainer: "DiffusionTrainer", folder: Path) -> None:
    """Writes the pipeline with the trained network; with PEFT, the merged network, and the adapter beside it."""
    network = _whole_network(trainer)
    if network is None or not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # not transformers' training_args.bin: a pickle with the Hub token in plain text
    (folder / "training_args.json").write_text(trainer.args.to_json_string() + "\n")
    if isinstance(network, PeftModel):
        save_adapter = getattr(trainer.policy, "save_adapter", lambda path, adapted: adapted.save_pretrained(path))
        save_adapter(os.path.join(folder, ADAPTER_FOLDER), network)
        network = _merged(trainer, network)
    trainer.policy.save_pretrained(folder, model=network)


def _whole_network(trainer: "DiffusionTrainer") -> nn.Module | None:
    """The network as it was before processes split it, with its present weights; `None` where it is not saved."""
    if not is_split(trainer.network):
        return trainer.network
    weights = whole_state_dict(trainer.network, keep=trainer.args.should_save)
    if not trainer.args.should_save:
        return None
    network = copy.deepcopy(trainer.skeleton)
    if trainer.is_deepspeed_enabled:  # which rounds buffers to half precision
        weights |= {name: value for name, value in network.state_dict().items() if not value.is_meta}
    network.load_state_dict(weights, assign=True)
    return network


def _merged(trainer: "DiffusionTrainer", network: PeftModel) -> nn.Module:
    """Merges the adapter in float32, because half precision would round small changes away; in CPU memory."""
    if getattr(network, "hf_quantizer", None) is not None:  # quantized layers know how to merge
        return copy.deepcopy(network).merge_and_unload()
    weights = {}
    for name, value in network.state_dict().items():
        dtype = torch.float32 if value.dtype in HALF_PRECISION else value.dtype
        weights[name] = value.detach().to("cpu", dtype, copy=True)  # merging writes into them
    merged = copy.deepcopy(trainer.skeleton)
    merged.load_state_dict(weights, assign=True)
    return merged.merge_and_unload()  # type: ignore[operator]


# ---- reading ----


def read_training_state(trainer: "DiffusionTrainer", folder: str) -> dict[str, Any]:
    """
    Reads what `training_state` returned when the checkpoint was written.

    Raises:
        FileNotFoundError: the checkpoint was written with `save_only_model=True`.
    """
    path = os.path.join(folder, TRAINING_STATE)
    if not _found_by_all(trainer, path):
        raise FileNotFoundError(
            f"{folder} has no {TRAINING_STATE}: a checkpoint saved with save_only_model=True holds the model alone. "
            "Resume from another one, or start a new run with this one as its model."
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def read_process_state(trainer: "DiffusionTrainer", folder: str) -> dict[str, Any] | None:
    """Reads this process's own state, if the checkpoint has one."""
    path = os.path.join(folder, PROCESS_STATE.format(trainer.args.process_index))
    return torch.load(path, map_location="cpu", weights_only=True) if _found_by_all(trainer, path) else None


def _found_by_all(trainer: "DiffusionTrainer", path: str) -> bool:
    found = torch.tensor([os.path.isfile(path)], device=trainer.accelerator.device)
    everyone = trainer.accelerator.gather(found)
    if bool(everyone.any()) and not bool(everyone.all()):
        missing = (~everyone).nonzero().flatten().tolist()
        raise ValueError(
            f"processes {missing} do not find {os.path.basename(path)} in the checkpoint: resume from a folder that "
            "all nodes share, with as many processes as wrote it."
        )
    return bool(everyone.all())


def load_trained_weights(trainer: "DiffusionTrainer", folder: str) -> None:
    """Loads the weights that training goes on with, and the average beside them."""
    state = read_training_state(trainer, folder)
    raw = os.path.join(folder, RAW_WEIGHTS)
    if os.path.isfile(raw):
        trained = load_file(raw)
        known = {name for name, p in trainer.network.named_parameters() if p.requires_grad}
        if set(trained) != known:
            odd = sorted(set(trained) ^ known)[:3]
            raise ValueError(
                f"{folder} was trained with other parameters, e.g. {odd}: resume with the model and peft_config that "
                "the run was started with."
            )
        load_whole_state_dict(trainer.network, trained, strict=False)
    else:
        load_pipeline_weights(trainer, folder)
    if trainer.ema is not None:
        trainer.ema = PolicyEMA(trainer.network, trainer.ema.decay)
        if state["ema"] is not None:
            trainer.ema.load_state_dict(state["ema"])


def load_pipeline_weights(trainer: "DiffusionTrainer", folder: str) -> None:
    """Loads the network's weights, or its adapter's, from a saved pipeline."""
    if not isinstance(trainer.network, PeftModel):
        try:
            load_whole_state_dict(trainer.network, trainer.policy.read_weights(folder))
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {folder} do not fit the network: resume with the model and peft_config that the run "
                f"was started with. {error}"
            ) from error
        return
    # The skeleton translates peft's names of the weights into those of the network's parameters.
    adapted = copy.deepcopy(trainer.skeleton)
    trained = {n: torch.full(p.shape, torch.nan) for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.load_state_dict(trained, strict=False, assign=True)
    set_peft_model_state_dict(adapted, load_peft_weights(os.path.join(folder, ADAPTER_FOLDER), device="cpu"))
    missing = [name for name, value in trained.items() if value.isnan().any()]
    if missing:
        raise ValueError(
            f"the adapter in {folder} lacks {len(missing)} trained parameters, e.g. {missing[0]}: resume with the "
            "peft_config that the run was started with."
        )
    load_whole_state_dict(trainer.network, trained, strict=False)
