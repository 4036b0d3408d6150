# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Resuming: which checkpoints are whole, what a resumed run may change, and who trains in an output folder."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft import PeftModel
from torch import Tensor
from transformers.trainer_utils import sort_checkpoints

from ..conditions import take
from ..files import State, sha256, write_json
from ..generation import image_generators

if TYPE_CHECKING:
    from .base import DiffusionTrainer

logger = get_logger(__name__)

IDENTITY, MANIFEST = "run_identity.json", "manifest.json"

# Beginnings of the names of settings that a resumed run may change. All others define the run.
_FREE = (
    *("max_steps", "num_train_epochs", "max_skipped_updates", "save_", "logging_", "log_", "report_to", "run_name"),
    *("project", "trackio_", "disable_tqdm", "push_to_hub", "hub_", "output_dir", "overwrite_", "resume_", "do_"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_", "load_best_", "per_device_"),
    *("rollout_batch_", "decode_batch_", "offload_", "checkpoint_steps", "activation_checkpointing"),
    *("gradient_checkpointing", "torch_", "dataloader_", "use_cpu", "local_rank", "ddp_", "fsdp_config", "deepspeed"),
    "reward_weights",  # compared by function
)
# Settings that may change unless the best model so far was chosen under them
_EVALUATION = (
    *("eval_samplers", "eval_solver", "eval_seed", "num_eval_images", "num_inference_steps_eval"),
    *("metric_for_best_model", "greater_is_better"),
)
_OF_A_COPY = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")  # of a peft_config


# ---- whole checkpoints ----


def write_manifest(trainer: "DiffusionTrainer", folder: Path) -> None:
    """Writes what identifies the run, and the checkpoint's last file: size and SHA-256 of all others."""
    write_json(folder / IDENTITY, {"processes": trainer.args.world_size} | trainer.identity)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in paths}
    write_json(folder / MANIFEST, files)


def damage(folder: Path) -> str | None:
    """Says what is missing or damaged in a checkpoint; `None` if it is whole."""
    try:
        for name, (size, digest) in json.loads((folder / MANIFEST).read_text()).items():
            if (folder / name).stat().st_size != size or sha256(folder / name) != digest:
                return f"{name} is damaged: its size or SHA-256 has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file that it lists cannot be read ({error})"
    return None


# ---- the output folder ----


@contextmanager
def output_folder(trainer: "DiffusionTrainer", resume: str | bool | None) -> Iterator[str | None]:
    """Keeps other runs out of the output folder; gives the whole checkpoint to resume from. All processes call it."""
    output_dir, answer = Path(trainer.args.output_dir), list[str | None]([None, None])
    lock = FileLock(output_dir / "_lock", timeout=0)  # names with an underscore are not pushed to the Hub
    try:
        if trainer.args.should_save:
            try:
                lock.acquire()
                answer[0] = _prepare(trainer, output_dir, resume)
            except Timeout:
                answer[1] = f"another process trains in output_dir={str(output_dir)!r}: stop it, or name another one."
            except (OSError, ValueError) as error:
                answer[1] = str(error)
        checkpoint, refusal = broadcast_object_list(answer)
        if refusal is not None:
            raise ValueError(refusal)
        yield checkpoint
    finally:
        lock.release()


def _prepare(trainer: "DiffusionTrainer", output_dir: Path, resume: str | bool | None) -> str | None:
    """Chooses the checkpoint to resume from, and clears the folder of those that the run does not go on from."""
    if trainer.trained_in is None:  # later, processes may hold parts of the weights
        trainer.identity = identity_of(trainer)
    others = [Path(path) for path in reversed(sort_checkpoints(str(output_dir)))]
    chosen = None
    if resume:
        chosen = newest_whole(others if resume is True else [Path(resume)])
        _check_settings(trainer, chosen)
        places = [folder.resolve() for folder in others]
        if chosen.resolve() in places:
            others = others[: places.index(chosen.resolve())]  # older ones belong to this run
    deletes = trainer.args.overwrite_output_dir and resume is not True
    if others and resume is not True and not deletes and trainer.trained_in != output_dir:
        remedy = "resume from it with resume_from_checkpoint=True, name another folder, or delete all such checkpoints"
        found = f"output_dir={str(output_dir)!r} holds {others[0].name}, which this run does not go on from"
        raise ValueError(f"{found}: {remedy} with overwrite_output_dir=True.")
    for folder in others:  # rotation would take them for the newest
        if deletes:
            shutil.rmtree(folder)
            continue
        aside = folder.with_name(f"{'_damaged' if resume is True else '_earlier'}-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    trainer.trained_in = output_dir
    return None if chosen is None else str(chosen)


def newest_whole(folders: Sequence[Path]) -> Path:
    """Returns the first folder that is a whole checkpoint; raises `ValueError` that says what is wrong with each."""
    passed_over: list[str] = []
    for folder in folders:
        wrong = damage(folder)
        if wrong is None:
            if passed_over:
                logger.warning(f"Resuming from {folder}. Renamed, as not whole: {'; '.join(passed_over)}.")
            return folder
        passed_over.append(f"{folder.name}: {wrong}")
    raise ValueError(f"there is no whole checkpoint. {'; '.join(passed_over) or 'output_dir holds none at all'}.")


# ---- settings ----


def identity_of(trainer: "DiffusionTrainer") -> State:
    """Describes what defines a run beside its configuration, in the types of JSON."""
    network, conditions = trainer.network, trainer.conditions
    start = getattr(trainer, "initial_model", None)  # what a KL divergence refers to
    fixed = [p for p in network.parameters() if not p.requires_grad] + ([] if start is None else [*start.parameters()])
    adapters = network.peft_config if isinstance(network, PeftModel) else {}
    listed = conditions.tolist() if isinstance(conditions, Tensor) else list(conditions)
    merged = getattr(trainer, "pool_description", {"members": []})["members"]
    found = {
        "trainer": type(trainer).__name__,
        "train_dataset": _short_digest([listed, trainer.rewards.rows()]),
        "sample_shape": trainer.policy.noise(take(conditions, [0]), image_generators(0, "", 0, [0])).shape,
        "frozen_weights": _short_digest([p.detach().dequantize().flatten()[:8].tolist() for p in fixed]),
        "checkpoints": [sorted(member["files"].values()) for member in merged],
        "adapters": list(adapters),
        **trainer.rewards.describe(),
    }
    for config in adapters.values():
        found |= {f"peft_config.{name}": value for name, value in config.to_dict().items() if name not in _OF_A_COPY}
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def _short_digest(content: object) -> str:
    text = json.dumps(content, default=lambda value: type(value).__name__)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check_settings(trainer: "DiffusionTrainer", folder: Path) -> None:
    """Raises `ValueError` if a setting differs that a resumed run must keep."""
    settings, identity = (json.loads((folder / name).read_text()) for name in ("training_args.json", IDENTITY))
    saved = settings | identity
    present = json.loads(trainer.args.to_json_string()) | trainer.identity
    free = _FREE if saved["metric_for_best_model"] else _FREE + _EVALUATION
    changed = [
        f"{name} was {saved[name]!r} and is {present[name]!r}"
        for name in sorted(saved.keys() & present.keys())
        if saved[name] != present[name] and not name.startswith(free)
    ]
    if changed:
        remedy = "set back what a run keeps, or start a new one, in another output_dir, from the weights there"
        raise ValueError(f"{folder} is of a run with other settings: {'; '.join(changed)}. Either {remedy}.")
    written, now = identity["processes"], trainer.args.world_size
    if written != now:
        logger.warning(f"{folder} was written by {written} processes, and this run has {now}: its last bits differ.")
