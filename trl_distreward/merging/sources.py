# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Find the weight files of a checkpoint, here or on the Hub, and read their headers before their weights."""

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import sha256
from ..hub import with_retries
from .adapters import ADAPTER_CONFIG, ADAPTER_FOLDER

T = TypeVar("T")

# a file of weights, or the index of its shards, which may be those of a variant: model.safetensors.index.fp16.json
WEIGHTS = re.compile(r".*\.safetensors(\.index(\.[^./]+)?\.json)?")
# names under which diffusers, transformers and peft save weights
USUAL = re.compile(r"(.*/)?(diffusion_pytorch_model|model|adapter_model)\.safetensors(\.index\.json)?")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::(\S*))?")
NO_PICKLES = (
    "pickles (.bin, .pth, .pt, .ckpt) run code when they are read, so convert them once with "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
)

# shape and dtype of a tensor, the dtype as safetensors writes it: ((1152, 4), "F16")
TensorSpec = tuple[tuple[int, ...], str]


class Checkpoint:
    """
    A checkpoint in a pool, known by the name `source`. Making one reads headers only; `load` gets the weights.

    Attributes:
        specs (`dict[str, TensorSpec]`): shape and dtype of its tensors, sorted by name.
        adapter_config (`dict` or `None`): content of `adapter_config.json`, if there is one beside the weights.
        config (`dict`): content of `config.json` beside the weights, empty if there is none.
        files (`dict[str, Path]`): local path of each weight file, by its name in the checkpoint's folder.
        place (`dict[str, str]`): where it is, for a description that may be published.
    """

    place: dict[str, str]

    def __init__(self, source: str, names: Collection[str], file: str | None):
        self.source = source
        file = file or find_weights(names, source)
        folder = file.rpartition("/")[0]
        weights = {file}
        if file.endswith(".json"):
            listed = json.loads(self._path(file).read_text())["weight_map"].values()
            weights = {f"{folder}/{shard}".lstrip("/") for shard in listed}
            if missing := sorted(weights - {*names}):  # among them files outside of the checkpoint's folder
                raise FileNotFoundError(f"{source} lacks {len(missing)} of {len(weights)} shards, e.g. {missing[0]}.")
        headers = {name: self._read_header(name) for name in sorted(weights)}
        self._file_of = {key: name for name, header in headers.items() for key in header}
        self.specs: dict[str, TensorSpec] = {key: headers[self._file_of[key]][key] for key in sorted(self._file_of)}
        beside = {name: f"{folder}/{name}".lstrip("/") for name in (ADAPTER_CONFIG, "config.json")}
        read = {name: json.loads(self._path(path).read_text()) for name, path in beside.items() if path in names}
        self.adapter_config, self.config = read.get(ADAPTER_CONFIG), read.get("config.json", {})
        self.files: dict[str, Path] = {}

    def load(self) -> dict[str, Tensor]:
        """Downloads the weight files that are missing here, and maps their tensors into memory."""
        self.files = {name: self._path(name) for name in sorted({*self._file_of.values()})}
        opened = {name: safe_open(path, framework="pt") for name, path in self.files.items()}
        return {key: opened[self._file_of[key]].get_tensor(key) for key in self.specs}

    def describe(self) -> dict[str, object]:
        """Describes where the checkpoint is, with the SHA-256 of its weight files."""
        return {**self.place, "files": {name: sha256(path) for name, path in self.files.items()}}

    def _path(self, name: str) -> Path:
        """Local path of a file, which is downloaded if it is missing."""
        raise NotImplementedError

    def _read_header(self, name: str) -> dict[str, TensorSpec]:
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                return {key: (tuple(found.get_shape()), found.get_dtype()) for key, found in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}. Save or download it again.") from error


class LocalCheckpoint(Checkpoint):
    """A checkpoint in a folder or file of this machine."""

    def __init__(self, source: str):
        path = Path(source).expanduser().absolute()
        self.place = {"path": path.name if path.parent == Path.home() else "/".join(path.parts[-2:])}  # no more
        self._folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        if file is not None and WEIGHTS.fullmatch(file) is None:
            raise ValueError(f"{source} is not a folder, a .safetensors file or the index of some; {NO_PICKLES}.")
        found = [path for pattern in ("*", "*/*") for path in self._folder.glob(pattern) if path.is_file()]
        super().__init__(source, {path.relative_to(self._folder).as_posix() for path in found}, file)

    def _path(self, name: str) -> Path:
        return self._folder / name


class HubCheckpoint(Checkpoint):
    """A checkpoint in a repository on the Hub; `revision` is the hash of the commit that its branch has now."""

    def __init__(self, source: str, token: str | bool | None):
        match = HUB_NAME.fullmatch(source)
        assert match is not None
        self.source, self.repo_id, self._branch = source, match[1], match[2] or constants.DEFAULT_REVISION
        self._api = huggingface_hub.HfApi(token=token)
        offline = huggingface_hub.is_offline_mode()
        self._options = {"token": token, "local_files_only": offline}
        self.revision, found = self._call(self._list_cached if offline else self._list)
        below, file = (match[3] or "").strip("/"), None
        if WEIGHTS.fullmatch(below):
            below, _, file = below.rpartition("/")
        self.subfolder, self._prefix = below, f"{below}/" if below else ""
        self.place = {"repo_id": self.repo_id, "revision": self.revision, "subfolder": below}
        names = {name.removeprefix(self._prefix) for name in found if name.startswith(self._prefix)}
        if not names or (file is not None and file not in names):
            folders = sorted({name.rpartition("/")[0] for name in found if WEIGHTS.fullmatch(name)})
            raise FileNotFoundError(f"{source} is not in {self.repo_id} at {self.revision[:12]}, but in {folders}.")
        super().__init__(source, names, file)

    def _call(self, call: Callable[[], T]) -> T:
        return with_retries(call, f"reading {self.source}", self.repo_id)

    def _list(self) -> tuple[str, list[str]]:
        """The commit and its files."""
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without one it waits for ever
        info = self._api.model_info(self.repo_id, revision=self._branch, timeout=timeout)
        return info.sha, [file.rfilename for file in info.siblings]

    def _list_cached(self) -> tuple[str, list[str]]:
        download = huggingface_hub.snapshot_download  # nothing, but tells the folder
        folder = Path(download(self.repo_id, revision=self._branch, allow_patterns=[], **self._options))
        return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def _path(self, name: str) -> Path:
        def download() -> Path:
            # by the branch's name, so that the cache knows it when there is no network
            file = self._prefix + name
            path = huggingface_hub.hf_hub_download(self.repo_id, file, revision=self._branch, **self._options)
            if self.revision not in Path(path).parts:
                raise ConnectionError(f"{self._branch} moved while it was read")
            return Path(path)

        return self._call(download)

    def _read_header(self, name: str) -> dict[str, TensorSpec]:
        """Reads the first bytes of a file on the Hub, unless the cache has the file."""
        file, at = self._prefix + name, {"revision": self.revision}
        if isinstance(huggingface_hub.try_to_load_from_cache(self.repo_id, file, **at), str):
            return super()._read_header(name)
        try:
            header = self._call(lambda: self._api.parse_safetensors_file_metadata(self.repo_id, file, **at))
        except SafetensorsParsingError as error:
            raise ValueError(f"{file} of {self.source} is not a safetensors file: upload it again.") from error
        return {key: (tuple(info.shape), info.dtype) for key, info in header.tensors.items()}


def open_checkpoint(source: str | os.PathLike, token: str | bool | None = None) -> Checkpoint:
    """Opens a checkpoint in a folder or file that exists here, or else on the Hub."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.exists():
        return LocalCheckpoint(name)
    if path.is_absolute() or name.startswith((".", "~")) or HUB_NAME.fullmatch(name) is None:
        known = "a folder, a .safetensors file, or 'org/repo@revision:subfolder'"
        raise FileNotFoundError(f"there is no file or folder {name}: pass {known}.")
    return HubCheckpoint(name, token)


def find_weights(names: Collection[str], source: str) -> str:
    """Finds the file with a checkpoint's weights, or the index of its shards, among the names of its files."""
    folder = ""
    if "model_index.json" in names:
        networks = [name for name in ("transformer", "unet") if any(n.startswith(f"{name}/") for n in names)]
        if len(networks) != 1:
            raise ValueError(f"the pipeline {source} has no single 'transformer' or 'unet': name the folder.")
        folder = networks[0]
    elif f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}" in names:  # a checkpoint of a run that trains an adapter
        folder = ADAPTER_FOLDER
    safe = sorted(name for name in names if name.rpartition("/")[0] == folder and WEIGHTS.fullmatch(name))
    usual = [name for name in safe if USUAL.fullmatch(name)]
    found = usual or [name for name in safe if name.endswith(".json")] or safe
    if len(found) == 1:
        return found[0]
    if safe:
        raise ValueError(f"{source} has several files of weights, {safe}: name one, e.g. {source}/{safe[0]}.")
    raise FileNotFoundError(f"{source} has no safetensors weights{f' in {folder}' if folder else ''}; {NO_PICKLES}.")
