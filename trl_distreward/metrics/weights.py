# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Files of network weights: found or downloaded, checked, and read without running anything that they carry."""

import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .numpy_pickle import BoundedUnpickler

HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?:(?P<file>[^:]+)")
# of the modules of a TorchScript archive, where one may be held in several places: far beyond any network's
_MAX_DEPTH, _MAX_MODULES = 100, 100_000


def find_weights(source: str | os.PathLike, sha256: str | None = None) -> Path:
    """
    Path of a file of weights, downloaded if need be.

    Args:
        source (`str` or path):
            a local file; a file on the Hub, `"org/repo:file"` or `"org/repo@revision:file"`; or a URL, whose file is
            kept where torch.hub keeps its checkpoints (`$TORCH_HOME/hub/checkpoints`), as pytorch-fid's is.
        sha256 (`str`, *optional*):
            hexadecimal digest the file must have, or its beginning of at least 8 digits; required with a URL.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the download failed or is forbidden by `HF_HUB_OFFLINE`; it says where to put the file.
        ValueError: the file has another digest; a URL came without one.
    """
    source = os.fspath(source)
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 8 to 64 lower-case hexadecimal digits.")
    if "://" in source:
        if sha256 is None:
            raise ValueError(f"{source} needs sha256=: a file from the network is only used when its digest is known.")
        path = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
        if not path.is_file():
            _download(source, path, sha256)
    elif (named := HUB_FILE.fullmatch(source)) and not os.path.exists(source):
        try:
            path = Path(hf_hub_download(named["repo"], named["file"], revision=named["revision"]))
        except OSError as error:
            raise ConnectionError(
                f"{source} cannot be had from the Hub ({error}): where there is a network, `hf download "
                f"{named['repo']} {named['file']}` puts it into the cache of the Hub; or give a local file."
            ) from error
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {source!r}: give a file, a file on the Hub as 'org/repo:file', or a URL."
            )
    if sha256 is not None:
        check_digest(path, sha256)
    return path


def check_digest(path: Path, sha256: str) -> None:
    """Raises `ValueError` if the file's SHA-256 does not begin with `sha256`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(
            f"{path} has sha256 {digest}, not {sha256}: it is damaged or another file; delete it and get it again."
        )


def _download(url: str, path: Path, sha256: str) -> None:
    remedy = f"put the file of sha256 {sha256} at {path}, or give a local file as source"
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, and {url} was not downloaded before: {remedy}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # the first of several processes on a machine downloads for all
        if path.is_file():
            return
        try:
            # to a temporary name, which becomes `path` once the digest is right
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (URLError, TimeoutError, ConnectionError) as error:
            raise ConnectionError(f"{url} cannot be downloaded ({error}): {remedy}.") from error
        except RuntimeError as error:
            raise ValueError(f"{url} is not the file it should be ({error}): {remedy}.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    Tensors of a `.safetensors` file, a state dict written by `torch.save`, or a TorchScript archive, by name.

    A TorchScript archive is read as a tree of attributes: its code is neither compiled nor run.

    Raises:
        ValueError: the file is damaged, holds something else, or would have to be unpickled freely.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a .safetensors file: {error}") from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(archive, path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; to read it would run code it carries. Use a state dict "
            f"written by torch.save, or .safetensors. ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    return dict(loaded)


class _Node:
    """Stands for any object of a TorchScript archive: it holds attributes and has no behaviour."""


def _read_torchscript(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """Tensors of a scripted module under the names its state dict would give them."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    try:
        tree = _ArchiveUnpickler(archive, root, path.stat().st_size).load()
        if isinstance(tree, _Node):
            return _tensors_of(tree)
    except Exception as error:  # a malformed pickle trips the machine that reads it in any of its instructions
        raise ValueError(f"{path} is a damaged TorchScript archive: {error} ({type(error).__name__}).") from error
    raise ValueError(f"{path} is a TorchScript archive of a {type(tree).__name__}, not of a module.")


def _tensors_of(tree: _Node) -> dict[str, Tensor]:
    """Tensors by name; a module that is held in two places has two names, as in a state dict."""
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[str, _Node, int]] = [("", tree, 0)]
    looked_at = 0
    while waiting:
        prefix, node, depth = waiting.pop()
        looked_at += 1
        if depth > _MAX_DEPTH or looked_at > _MAX_MODULES:
            raise pickle.UnpicklingError(
                f"its modules are nested more than {_MAX_DEPTH} deep, or hold one another more than {_MAX_MODULES} "
                "times, which no network does"
            )
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Node):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    return tensors


class _ArchiveUnpickler(BoundedUnpickler):
    """Builds nodes, lists and tensors, whatever the archive asks for, in memory of the size of its file."""

    def __init__(self, archive: zipfile.ZipFile, root: str, size: int):
        self.archive, self.root, self.size = archive, root, size
        self.storages: dict[tuple[str, str], Tensor] = {}
        super().__init__(io.BytesIO(self._read("data.pkl")))

    def _read(self, name: str) -> bytes:
        info = self.archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise pickle.UnpicklingError(f"{name} is compressed, or claims more bytes than the file has")
        return self.archive.read(info)

    def find_class(self, module: str, name: str) -> Any:
        # a pickle may set attributes of what it is given: a new class or function each time, which nobody else holds
        if module.startswith("__torch__"):
            return type("_Node", (_Node,), {})
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: self._tensor(*arguments)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: {}
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no archive of weights needs")

    def persistent_load(self, identifier: tuple) -> Tensor:
        _, kind, key, _, _ = identifier
        if kind not in ("FloatStorage", "DoubleStorage", "HalfStorage", "LongStorage"):
            raise pickle.UnpicklingError(f"it holds a {kind}, which is not read: save the weights as float32")
        if (kind, key) not in self.storages:
            dtype = getattr(torch, kind.removesuffix("Storage").lower())
            self.storages[kind, key] = torch.frombuffer(bytearray(self._read(f"data/{key}")), dtype=dtype)
        return self.storages[kind, key]

    def _tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        if math.prod(size) * storage.itemsize > self.size:  # values may be repeated, as in a tensor that was expanded
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is larger than the file")
        return storage.as_strided(size, stride, offset)  # a view: copies of one storage could be many
