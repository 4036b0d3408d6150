# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Load EDM2's published snapshots (`.pkl`) as [`EDM2UNet2DModel`], without executing anything in them."""

import inspect
import os
import pickle
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models.edm2 import EDM2UNet2DModel
from .restricted_pickle import Value, is_record, load_records, read_array, read_tensor

# arguments that have other names here; defaults are the same
_RENAMED = {"img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_classes"}
# arguments that change nothing as long as they have these values
_FIXED = {"channel_mult_noise": None, "channel_mult_emb": None, "resample_filter": [1, 1]}


@dataclass(frozen=True)
class OriginalEDM2:
    """Content of a snapshot; `vae` is the Hub id of the VAE whose latents it denoises, `None` for pixels."""

    config: dict[str, Value]
    state_dict: dict[str, Tensor]
    vae: str | None
    latents: dict[str, list[float]]


def read_original_edm2(path: str | os.PathLike) -> OriginalEDM2:
    """Reads a snapshot (`.pkl`) that NVIDIA's code wrote, or raises `ValueError`. Nothing in it is executed."""
    try:
        return _interpret(load_records(Path(path)), os.path.getsize(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # a malformed snapshot can raise anything
        known = isinstance(error, pickle.UnpicklingError)
        reason = str(error) if known else f"it is not laid out as one ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is refused as an EDM2 snapshot: {reason}. Nothing in it was executed.") from error


def load_original_edm2(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> EDM2UNet2DModel:
    """Loads the network of a snapshot (`.pkl`), in evaluation mode; gains and frequencies stay float32."""
    return build_edm2(read_original_edm2(path), dtype)


def build_edm2(original: OriginalEDM2, dtype: torch.dtype = torch.float32) -> EDM2UNet2DModel:
    """Builds the network of a snapshot that was read, in evaluation mode; see [`~conversion.load_original_edm2`]."""
    weights = {}
    for name, value in original.state_dict.items():
        stays = any(part in name for part in EDM2UNet2DModel._keep_in_fp32_modules)
        weights[name] = value.to(torch.float32 if stays else dtype)
    try:
        levels = len(original.config.get("channel_mult", "1"))
        if original.config.get("num_blocks", 0) > len(weights) or levels > len(weights):  # to make them takes forever
            raise ArithmeticError(f"{len(weights)} weights are too few for so many blocks")
        with torch.device("meta"):  # no random weights that are thrown away
            model = EDM2UNet2DModel(**original.config)
        model.load_state_dict(weights, assign=True)
    except (TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ValueError(f"the snapshot's weights do not fit its network, {original.config}: {error}") from error
    return model.eval()


def _interpret(snapshot: Value, size: int) -> OriginalEDM2:
    network = snapshot["ema"]
    if _class_name(network) != "Precond":
        raise pickle.UnpicklingError(f"its network is a {_class_name(network)}, not a Precond")
    weights, seen = {}, 0
    for name, value in _tensors(network):
        weights[name], seen = value, seen + value.nbytes
        if seen > size:  # the same values again and again
            raise pickle.UnpicklingError(f"its weights take more memory than its {size} bytes")
    return OriginalEDM2(_read_config(_state(network)), weights, *_read_encoder(snapshot.get("encoder")))


def _state(record: Value) -> dict[str, Value]:
    """Attributes of a persistent object, or of one of torch's containers."""
    if is_record(record, "_reconstruct_persistent_obj"):
        return record.args[0]["state"]  # the source code beside it is not read
    if is_record(record, "ModuleDict", "ModuleList"):
        return record.state
    raise pickle.UnpicklingError(f"a {type(record).__name__} is where a module should be")


def _class_name(record: Value) -> str:
    return record.args[0]["class_name"] if is_record(record, "_reconstruct_persistent_obj") else type(record).__name__


def _tensors(module: Value, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields parameters, buffers, and those of submodules, in the order of `torch.nn.Module.state_dict`."""
    state = _state(module)
    for name, value in [*state["_parameters"].items(), *state["_buffers"].items()]:
        if value is not None:
            yield prefix + name, read_tensor(value)
    for name, child in state.pop("_modules").items():  # a module that is in itself, or twice in each of many, fails
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def _read_config(state: dict[str, Value]) -> dict[str, Value]:
    if state["_init_args"]:
        raise pickle.UnpicklingError("its network has arguments without names")
    known = inspect.signature(EDM2UNet2DModel.__init__).parameters
    config = {}
    for name, value in state["_init_kwargs"].items():
        if _RENAMED.get(name, name) in known:
            config[_RENAMED.get(name, name)] = value
        elif name != "use_fp16" and (name not in _FIXED or value != _FIXED[name]):
            raise pickle.UnpicklingError(f"its network has {name}={reprlib.repr(value)}, unlike any EDM2UNet2DModel")
    return config


def _read_encoder(encoder: Value) -> tuple[str | None, dict[str, list[float]]]:
    """The VAE's Hub id, and the scale and bias of its latents."""
    if encoder is None or _class_name(encoder) == "StandardRGBEncoder":
        return None, {}
    if _class_name(encoder) != "StabilityVAEEncoder":
        raise pickle.UnpicklingError(f"its encoder is a {_class_name(encoder)}, which is not known")
    state = _state(encoder)
    return str(state["vae_name"]), {f"latents_{name}": read_array(state[name]).tolist() for name in ("scale", "bias")}
