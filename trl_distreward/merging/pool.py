# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A pool of checkpoints of one network, and any weighted sum of them."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import CONFIG, check_configs, concatenated, concatenated_axis, is_factor, widened_config
from .files import TensorSpec, check_alike, read_header, replace_file
from .hub_source import HUB_NAME, HubSource
from .sources import LocalSource, PoolMember, Source, read_layout
from .sums import sum_dtype, weighted_sum


def open_source(source: str | os.PathLike, **hub: Any) -> Source:
    """
    A checkpoint by its name: what exists here is local, anything else is on the Hub.

    Raises:
        FileNotFoundError: neither exists.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.exists() or path.is_symlink():
        return LocalSource(name)
    if path.is_absolute() or name.startswith((".", "~")) or HUB_NAME.fullmatch(name) is None:
        raise FileNotFoundError(
            f"there is no file or folder {name}: pass a folder, a .safetensors file, or 'org/repo@revision:subfolder'."
        )
    return HubSource(name, **hub)


class CheckpointPool:
    """
    Checkpoints of one network: the same tensors, in the same shapes and dtypes.

    Headers are read and compared first; only then are weights downloaded, each file once, and mapped into memory.

    Args:
        checkpoints (`list[str]`):
            pipeline folders, model folders, adapter folders, checkpoints of this library's trainers, `.safetensors`
            files or their indexes; on the Hub `org/repo@revision:subfolder`, where the revision is resolved to a
            commit. In the order of training, as the last one gives what is copied.
        component (`str`, *optional*): folder of a pipeline; by default `transformer` or `unet`, whichever is there.
        buffers (`list[str]`, *optional*):
            names of the network's buffers, which a file does not tell from parameters: copied from the last checkpoint
            and never averaged, as integer tensors are. Those that no checkpoint has are ignored.
        adapters (`str`, *optional*, defaults to `"exact"`):
            of LoRA adapters, `"exact"` combines what they add to the weights, which makes an adapter of `N_c` times
            the rank; `"linear"` combines their factors, which keeps the rank and adds cross terms.
        cache_dir, token, local_files_only: as in [`~huggingface_hub.hf_hub_download`]; the token is not kept.

    Attributes:
        members (`list[PoolMember]`): sources, as asked for and resolved, and their files with SHA-256.
        keys (`list[str]`), shapes (`dict[str, torch.Size]`), dtypes (`dict[str, torch.dtype]`):
            of the tensors that a merge has.
        copied (`set[str]`): tensors taken from the last checkpoint.
        weighted (`list[str]`): the others, which are weighted sums.

    Raises:
        ValueError: checkpoints differ, or a file is damaged; the message names the odd one out.
        FileNotFoundError, PermissionError, ConnectionError: a checkpoint cannot be had.
    """

    def __init__(
        self,
        checkpoints: Sequence[str | os.PathLike],
        *,
        component: str | None = None,
        buffers: Collection[str] = (),
        adapters: Literal["exact", "linear"] = "exact",
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ):
        if isinstance(checkpoints, str | os.PathLike) or not checkpoints:
            raise ValueError(f"checkpoints={checkpoints!r} must be a list of at least one checkpoint.")
        if adapters not in ("exact", "linear"):
            raise ValueError(f"adapters={adapters!r} is unknown: choose 'exact' or 'linear'.")
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        sources = [open_source(checkpoint, **hub) for checkpoint in checkpoints]
        layouts, specs = zip(*(read_layout(source, component) for source in sources), strict=True)
        check_alike(specs, [source.name for source in sources])
        self._adapter_config = _adapter_config(sources, layouts, adapters)
        self._concatenates = self._adapter_config is not None and adapters == "exact"
        self.members: list[PoolMember] = []
        self._tensors: list[dict[str, Tensor]] = []
        for source, layout, spec in zip(sources, layouts, specs, strict=True):
            paths = {file: source.path(file) for file in sorted({*layout.values()})}
            self._tensors.append(_mapped(paths, layout, spec))
            self.members.append(source.member(paths))
        self._specs = specs[0]
        self._warned = False
        integers = {key for key, spec in self._specs.items() if not _is_summed(spec.dtype)}
        self.copied = integers | ({*buffers} & {*self._specs})

    def __len__(self) -> int:
        return len(self.members)

    @property
    def keys(self) -> list[str]:
        return list(self._specs)

    @property
    def weighted(self) -> list[str]:
        return [key for key in self._specs if key not in self.copied]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: spec.dtype for key, spec in self._specs.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {key: torch.Size(self._shape(key)) for key in self._specs}

    @property
    def nbytes(self) -> int:
        """Bytes of all checkpoints together."""
        return sum(tensor.nbytes for tensors in self._tensors for tensor in tensors.values())

    @property
    def device(self) -> torch.device:
        """Where the checkpoints are, and so their sums."""
        return next(iter(self._tensors[-1].values())).device

    @property
    def adapter_config(self) -> LoraConfig | None:
        """For [`~peft.get_peft_model`], the adapter that a merge is; `None` for a pool of whole models."""
        return None if self._adapter_config is None else LoraConfig.from_peft_type(**self._adapter_config)

    def tensor(self, index: int, key: str) -> Tensor:
        """A tensor of one checkpoint, as it lies in its file or on the device; not to be changed."""
        return self._tensors[index][key]

    def _shape(self, key: str) -> tuple[int, ...]:
        shape, axis = list(self._specs[key].shape), concatenated_axis(key) if self._concatenates else None
        if axis is not None:
            shape[axis] *= len(self)
        return tuple(shape)

    # ---- weighted sums ----

    def _rows(self, weights: Tensor, groups: Mapping[str, int] | None, copied: set[str]) -> dict[str, list[float]]:
        """The coefficients of each tensor that is a weighted sum."""
        table = torch.as_tensor(weights, dtype=torch.float64).cpu()
        rows = table[None] if groups is None else table
        if rows.ndim != 2 or rows.shape[1] != len(self) or not len(rows):
            shape = f"({len(self)},)" if groups is None else f"(groups, {len(self)})"
            raise ValueError(f"weights have shape {tuple(table.shape)}, but must have {shape}: one per checkpoint.")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"weights must be finite, but are {table.tolist()}.")
        keys = [key for key in self._specs if key not in copied]
        if groups is None:
            return dict.fromkeys(keys, rows[0].tolist())
        odd = sorted({*keys} - {*groups})[:3] or sorted({*groups} - {*self._specs})[:3]
        if odd:
            raise ValueError(f"groups must name every weighted tensor of the pool and no other, but e.g. not {odd}.")
        outside = {key: groups[key] for key in keys if not 0 <= groups[key] < len(rows)}
        if outside:
            raise ValueError(
                f"groups name rows that weights of {len(rows)} rows lack: {dict([*outside.items()][:3])}."
            )
        listed = rows.tolist()
        return {key: listed[groups[key]] for key in keys}

    def _warn_of_different_copies(self, copied: set[str]) -> None:
        if self._warned:
            return
        self._warned = True
        last = self._tensors[-1]
        differ = sorted(k for k in copied if any(not _equal(tensors[k], last[k]) for tensors in self._tensors))
        if differ:
            warnings.warn(
                f"{len(differ)} buffers or integer tensors differ between checkpoints, e.g. {differ[0]}: they are "
                f"taken from the last one, {self.members[-1].source}.",
                stacklevel=4,
            )

    def _sum(self, key: str, row: Sequence[float], out: Tensor | None = None) -> Tensor:
        members = [tensors[key] for tensors in self._tensors]
        if self._concatenates and concatenated_axis(key) is not None:
            return concatenated(key, members, row)
        if out is None:
            out = torch.empty(members[0].shape, dtype=sum_dtype(members[0].dtype), device=members[0].device)
        return weighted_sum(members, row, out)

    @torch.no_grad()
    def merged(self, weights: Tensor, groups: Mapping[str, int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """
        The weighted sum of the checkpoints, tensor by tensor.

        Sums are made in float32, of float64 checkpoints in float64. Buffers and integer tensors are copies of the last
        checkpoint's, with a warning where they differ.

        Args:
            weights (`torch.Tensor` of shape `(N_c,)` or `(groups, N_c)`): coefficients, used as they are.
            groups (`dict[str, int]`, *optional*):
                the row of `weights` for each tensor; every weighted tensor must be named.

        Yields:
            name and tensor, on the pool's device; the tensors may be changed.

        Raises:
            ValueError: weights or groups do not fit the pool, or are not finite.
        """
        rows = self._rows(weights, groups, self.copied)
        self._warn_of_different_copies(self.copied)
        return ((k, self._sum(k, rows[k]) if k in rows else self._tensors[-1][k].clone()) for k in self._specs)

    @torch.no_grad()
    def merge_into(self, network: nn.Module, weights: Tensor, groups: Mapping[str, int] | None = None) -> None:
        """
        Overwrites the network's weights with a weighted sum of the checkpoints, with no second copy of the model.

        The network's own buffers are copied from the last checkpoint, whether they were named or not. What the network
        has beyond its state dict stays.

        Args:
            network (`torch.nn.Module`):
                with the pool's tensors as its state dict, in any floating dtype and on any device; for adapters a
                [`~peft.PeftModel`] made with `adapter_config`.
            weights, groups: as in `merged`.

        Raises:
            ValueError: the network does not fit the pool; it is unchanged then.
        """
        if self._adapter_config is not None:
            return self._merge_into_adapter(network, weights, groups)
        state = self._check_network(network)
        buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
        copied = self.copied | (buffers & {*self._specs})
        rows = self._rows(weights, groups, copied)
        self._warn_of_different_copies(copied)
        for key in self._specs:
            target, source = state[key], self._tensors[-1][key]
            if key in copied:
                target.copy_(source)
            elif target.device == source.device and target.is_contiguous() and target.dtype == sum_dtype(source.dtype):
                self._sum(key, rows[key], out=target)
            else:
                target.copy_(self._sum(key, rows[key]))

    def _check_network(self, network: nn.Module) -> dict[str, Tensor]:
        state = network.state_dict()
        held = {tensor.data_ptr() for key, tensor in state.items() if key in self._specs and tensor.numel()}
        missing = [key for key, tensor in state.items() if key not in self._specs and tensor.data_ptr() not in held]
        extra = [key for key in self._specs if key not in state]
        if missing or extra:
            what = f"lacks {missing[0]}, which the network has" if missing else f"has {extra[0]}, which it has not"
            raise ValueError(
                f"the pool does not fit {type(network).__name__}: it {what} ({len(missing)} and {len(extra)} such)."
            )
        for key in self._specs:
            if state[key].shape != self._shape(key):
                raise ValueError(
                    f"{key} is {tuple(state[key].shape)} in {type(network).__name__}, but {self._shape(key)} in the "
                    "pool: make the network with the checkpoints' configuration."
                )
        return state

    def _merge_into_adapter(self, network: nn.Module, weights: Tensor, groups: Mapping[str, int] | None) -> None:
        if not isinstance(network, PeftModel):
            raise ValueError(
                f"a pool of adapters merges into a PeftModel, not {type(network).__name__}: pass "
                "peft.get_peft_model(network, pool.adapter_config)."
            )
        shapes, state = self.shapes, get_peft_model_state_dict(network, save_embedding_layers=False)
        differ = sorted(key for key in {*state, *shapes} if key not in state or shapes.get(key) != state[key].shape)
        if differ:
            raise ValueError(
                f"the network's adapter is not like the pool's, e.g. in {differ[0]} ({len(differ)} tensors differ): "
                "make it with peft.get_peft_model(network, pool.adapter_config)."
            )
        set_peft_model_state_dict(network, dict(self.merged(weights, groups)))

    def load_resident(self, device: str | torch.device) -> None:
        """
        Copies the pool to a device, where a candidate is then one weighted sum.

        On the CPU there is nothing to do: mapped files are in the page cache once they were read.

        Raises:
            ValueError: the device's free memory does not hold the pool.
        """
        device = torch.device(device)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if self.nbytes > free:
                raise ValueError(
                    f"the pool takes {self.nbytes / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free: "
                    "leave it on the CPU, whence it is merged as well."
                )
        self._tensors = [{key: tensor.to(device) for key, tensor in tensors.items()} for tensors in self._tensors]

    # ---- files ----

    def save_merged(
        self,
        path: str | os.PathLike,
        weights: Tensor,
        metadata: Mapping[str, Any] | None = None,
        groups: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Writes a weighted sum as a safetensors file, whole or not at all.

        Its metadata has `coefficients`, `pool` (see `describe`) and what is given, each as JSON. For adapters
        `adapter_config.json` is written beside it.

        Args:
            path (`str`): file to write; one that is there is replaced.
            weights, groups: as in `merged`.
            metadata (`dict`, *optional*): more to write, such as the recipe.
            dtype (`torch.dtype`, *optional*): of the sums; by default the checkpoints'.

        Raises:
            ValueError: a sum is not finite in its dtype.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path={path} must end in .safetensors.")
        tensors = {}
        for key, tensor in self.merged(weights, groups):
            if key not in self.copied:
                tensor = tensor.to(self.dtypes[key] if dtype is None else dtype)
                if not bool(torch.isfinite(tensor.float()).all()):  # which float8 has no kernel for
                    raise ValueError(
                        f"{key} is not finite in {tensor.dtype}: pass dtype=torch.float32, or smaller weights."
                    )
            tensors[key] = tensor.cpu().contiguous()
        about = {
            "coefficients": torch.as_tensor(weights).double().tolist(),
            "pool": self.describe(),
            **(metadata or {}),
        }
        if groups is not None:
            about["groups"] = dict(groups)
        header = {"format": "pt", **{name: json.dumps(value, default=str) for name, value in about.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._adapter_config is not None:
            text = json.dumps(self._adapter_config, indent=2, default=str) + "\n"
            replace_file(path.with_name(CONFIG), lambda partial: partial.write_text(text))
        replace_file(path, lambda partial: save_file(tensors, partial, metadata=header))

    def describe(self) -> dict[str, Any]:
        """
        What the pool is, for metadata and model cards: its tensors, and each checkpoint's place and hashes.

        Raises:
            ValueError: a file was changed after the pool was opened, or is not the one that the Hub has.
        """
        kinds = Counter(str(spec.dtype).removeprefix("torch.") for spec in self._specs.values())
        return {
            "num_checkpoints": len(self),
            "num_parameters": sum(torch.Size(self._specs[key].shape).numel() for key in self.weighted),
            "dtype": kinds.most_common(1)[0][0],
            "adapters": None if self._adapter_config is None else "exact" if self._concatenates else "linear",
            "copied_from_last": sorted(self.copied),
            "members": [member.describe() for member in self.members],
        }


def _is_summed(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _adapter_config(
    sources: Sequence[Source], layouts: Sequence[Mapping[str, str]], adapters: str
) -> dict[str, Any] | None:
    """The configuration of the merged adapter; `None` where the checkpoints are no adapters."""
    files = [f"{next(iter(layout.values())).rpartition('/')[0]}/{CONFIG}".lstrip("/") for layout in layouts]
    have = [file in source.names for source, file in zip(sources, files, strict=True)]
    if not any(have):
        odd = next((key for key in layouts[0] if is_factor(key)), None)
        if odd is not None and adapters == "exact":
            raise ValueError(
                f"{sources[0].name} has factors of a LoRA, e.g. {odd}, and no {CONFIG}, which gives them their "
                "meaning: save each adapter with peft's PeftModel.save_pretrained, or pass adapters='linear' to "
                "combine the factors as any other tensors, which makes another model."
            )
        return None
    if not all(have):
        raise ValueError(f"{sources[have.index(False)].name} has no {CONFIG}, as other checkpoints have: add it.")
    configs = [json.loads(source.read_text(file)) for source, file in zip(sources, files, strict=True)]
    check_configs(configs, [source.name for source in sources])
    return widened_config(configs[0], len(sources)) if adapters == "exact" else configs[0]


def _mapped(
    paths: Mapping[str, Path], layout: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """Tensors that lie in the files, mapped into memory."""
    for file, path in paths.items():
        found = read_header(path)
        odd = [key for key, shard in layout.items() if shard == file and found.get(key) != specs[key]]
        if odd:
            raise ValueError(
                f"{path} is not the file whose header was read: {odd[0]} differs. Delete it, and try again."
            )
    opened = {file: safe_open(path, framework="pt", device="cpu") for file, path in paths.items()}
    return {key: opened[layout[key]].get_tensor(key) for key in specs}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, of tensors of one shape and dtype: not every dtype has a kernel that compares."""
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
