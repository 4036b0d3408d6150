# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A pool of checkpoints of one network, and weighted sums of them."""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_json, written_whole
from ..saving import without_machine
from .adapters import ADAPTER_CONFIG, concatenated, concatenated_axis, merged_adapter_config
from .sources import Checkpoint, open_checkpoint


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Computes `sum_i weights[i] * tensors[i]` in float32 or float64; tensors of weight 0 are not read."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    used = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if not used:
        return torch.zeros_like(tensors[0], dtype=dtype)
    (first, scale), *others = used
    total = first.to(dtype) * scale
    for tensor, weight in others:
        total.add_(tensor.to(dtype), alpha=weight)
    return total


class CheckpointPool:
    """
    Checkpoints of one network, or LoRA adapters of one network, with the same tensors in the same shapes and dtypes.

    The headers of all checkpoints are compared first, and a `ValueError` names the odd one out. Only then are weights
    downloaded, and mapped into memory.

    Args:
        checkpoints (`list[str]`):
            pipeline folders, model folders, adapter folders, checkpoints of this library's trainers, `.safetensors`
            files, or `org/repo@revision:subfolder` on the Hub; in the order of training.
        buffers (`list[str]`, *optional*):
            names of the network's buffers, which files do not tell from parameters. They are copied from the last
            checkpoint, as integer tensors are. Unknown names are ignored.
        token (`str` or `bool`, *optional*): token for the Hub; the stored one by default.

    Attributes:
        copied, weighted: names of the tensors that are copied from the last checkpoint, and of the weighted sums.
    """

    def __init__(
        self,
        checkpoints: Sequence[str | os.PathLike],
        *,
        buffers: Collection[str] = (),
        token: str | bool | None = None,
    ):
        if isinstance(checkpoints, str | os.PathLike) or not checkpoints:
            raise ValueError(f"checkpoints={checkpoints!r} must be a list of at least one checkpoint.")
        self.members = [open_checkpoint(checkpoint, token) for checkpoint in checkpoints]
        check_alike(self.members)
        self._adapter_config = merged_adapter_config(self.members)
        self._tensors = [member.load() for member in self.members]
        last = self._tensors[-1]
        self.copied = {key for key, tensor in last.items() if not tensor.is_floating_point() or key in buffers}
        self.weighted = [key for key in last if key not in self.copied]
        others = [(key, tensors[key]) for key in sorted(self.copied) for tensors in self._tensors]
        differ = list(dict.fromkeys(key for key, other in others if not other.double().equal(last[key].double())))
        if differ:
            found = f"{len(differ)} buffers or integer tensors differ between the checkpoints, e.g. {differ[0]}"
            warnings.warn(f"{found}: they are taken from the last, {self.members[-1].source}.", stacklevel=2)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the merged tensors; adapters are concatenated along their rank."""
        shapes = {}
        for key, tensor in self._tensors[-1].items():
            shape, axis = list(tensor.shape), self._axis(key)
            if axis is not None:
                shape[axis] *= len(self)
            shapes[key] = torch.Size(shape)
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all checkpoints together."""
        return sum(tensor.nbytes for tensors in self._tensors for tensor in tensors.values())

    @property
    def adapter_config(self) -> LoraConfig | None:
        """Configuration of a merged adapter, for [`~peft.get_peft_model`]; `None` for a pool of whole models."""
        return None if self._adapter_config is None else LoraConfig.from_peft_type(**self._adapter_config)

    def load_resident(self, device: str | torch.device) -> None:
        """Copies the pool to a device, where merges are then made."""
        self._tensors = [{key: tensor.to(device) for key, tensor in tensors.items()} for tensors in self._tensors]

    def describe(self) -> dict[str, object]:
        """Describes each checkpoint's place and SHA-256, and the merge; reads all weight files."""
        return {
            "adapters": self._adapter_config is not None,
            "copied_from_last": sorted(self.copied),
            "members": [member.describe() for member in self.members],
        }

    @torch.no_grad()
    def merged(self, weights: Tensor, groups: Mapping[str, int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """
        Yields names and tensors of the merged checkpoints, on the pool's device (Eq. 7 of arXiv 2607.02291).

        Sums are made in float32, or in float64 if the checkpoints are. LoRA factors become those of one adapter with
        the summed rank, which adds exactly the weighted sum. `weights` `(N_c,)` are used as they are; with `groups`,
        the row of each tensor in `weighted`, they are `(groups, N_c)`.
        """
        rows = self._rows(weights, groups)
        last = self._tensors[-1]
        return ((key, self._sum(key, rows[key]) if key in rows else last[key].clone()) for key in last)

    @torch.no_grad()
    def merge_into(self, network: nn.Module, weights: Tensor, groups: Mapping[str, int] | None = None) -> None:
        """
        Overwrites a network's weights with a weighted sum, tensor by tensor; see `merged` for `weights` and `groups`.
        For adapters it is a [`~peft.PeftModel`] made with `adapter_config`. Its own buffers are copied from the last
        checkpoint. If it does not fit the pool, a `ValueError` leaves it unchanged.
        """
        state = self._state_of(network)
        rows = self._rows(weights, groups)
        copied = self.copied | {name for name, _ in network.named_buffers(remove_duplicate=False)}
        for key, source in self._tensors[-1].items():
            state[key].copy_(source if key in copied else self._sum(key, rows[key]))

    def save_merged(self, path: str | os.PathLike, weights: Tensor, groups: Mapping[str, int] | None = None) -> None:
        """Writes a weighted sum, see `merged`, in the checkpoints' dtype, with an adapter's configuration."""
        tensors = {}
        for key, tensor in self.merged(weights, groups):
            if key not in self.copied:
                tensor = tensor.to(self._tensors[-1][key].dtype)
                if not bool(torch.isfinite(tensor.float()).all()):  # float8 has no isfinite
                    raise ValueError(f"{key} is not finite in {tensor.dtype}: pass smaller weights.")
            tensors[key] = tensor.cpu().contiguous()
        if self._adapter_config is not None:
            write_json(Path(path).with_name(ADAPTER_CONFIG), without_machine(self._adapter_config))
        with written_whole(path) as file:
            save_file(tensors, file.name, metadata={"format": "pt"})

    def _axis(self, key: str) -> int | None:
        return None if self._adapter_config is None else concatenated_axis(key)

    def _rows(self, weights: Tensor, groups: Mapping[str, int] | None) -> dict[str, list[float]]:
        """Coefficients of each weighted tensor."""
        table = torch.as_tensor(weights, dtype=torch.float64).cpu()
        if groups is None:
            groups, table = dict.fromkeys(self.weighted, 0), table[None]
        if table.ndim != 2 or table.shape[1] != len(self):
            rule = f"({len(self)},), one per checkpoint, or with groups (groups, {len(self)})"
            raise ValueError(f"weights have shape {tuple(weights.shape)}: pass {rule}.")
        rows = table.tolist()
        return {key: rows[groups[key]] for key in self.weighted}

    def _sum(self, key: str, row: Sequence[float]) -> Tensor:
        members, axis = [tensors[key] for tensors in self._tensors], self._axis(key)
        return weighted_sum(members, row) if axis is None else concatenated(members, row, axis)

    def _state_of(self, network: nn.Module) -> dict[str, Tensor]:
        """The tensors of a network, or `ValueError` if it does not fit the pool."""
        if isinstance(network, PeftModel):
            state = get_peft_model_state_dict(network, save_embedding_layers=False)
        else:
            state = network.state_dict()
        shapes = self.shapes
        held = {tensor.data_ptr() for key, tensor in state.items() if key in shapes}  # under another name as well
        missing = [key for key, tensor in state.items() if key not in shapes and tensor.data_ptr() not in held]
        odd = missing + [key for key in shapes if key not in state or state[key].shape != shapes[key]]
        if odd:
            adapters = "" if self._adapter_config is None else " and peft.get_peft_model(network, pool.adapter_config)"
            found = f"{type(network).__name__} and the pool differ in {len(odd)} tensors, e.g. the shape of {odd[0]}"
            raise ValueError(f"{found}: make the network with the checkpoints' configuration{adapters}.")
        return state


def check_alike(members: Sequence[Checkpoint]) -> None:
    """Raises `ValueError` if a checkpoint differs from most of the others, or from the first if none agree."""
    kinds = [member.specs for member in members]
    usual = max(kinds, key=kinds.count)
    for member in members:
        keys = [key for key in {*member.specs, *usual} if member.specs.get(key) != usual.get(key)]
        if keys:
            key, other = min(keys), members[kinds.index(usual)].source
            both = f"{key} is {member.specs.get(key, 'absent')} in it, but {usual.get(key, 'absent')} there"
            raise ValueError(f"{member.source} is not like {other}: {both}. Leave it out.")
        config, expected = member.config, members[0].config
        for key in sorted(config.keys() & expected.keys()):  # releases of diffusers add and drop entries
            if not key.startswith("_") and config[key] != expected[key]:
                both = f"{key} is {config[key]!r} in its config.json, but {expected[key]!r} there"
                raise ValueError(f"{member.source} is not like {members[0].source}: {both}. Leave it out.")
