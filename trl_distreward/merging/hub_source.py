# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint on the Hub: pinned to a commit, its headers read before its weights are downloaded."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..hub import with_retries
from .files import PICKLES, WEIGHTS, TensorSpec, header_length, no_pickle, parse_header, read_header, replace_file
from .sources import PoolFile, PoolMember

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<subfolder>\S*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_BYTES = 100_000  # most headers are shorter


class HubSource:
    """
    A folder of a Hub repository, or one file of it, at the commit its revision has now.

    Args:
        source (`str`): `org/repo@revision:subfolder`; revision `main` and the root by default.
        cache_dir, token, local_files_only: as in [`~huggingface_hub.hf_hub_download`].

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see [`~hub.with_retries`].
        ValueError: the subfolder leaves the repository.
    """

    def __init__(
        self,
        source: str,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ):
        match = HUB_NAME.fullmatch(source)
        assert match is not None
        self.name, self.repo_id = source, match["repo"]
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE)
        self._token = token
        self.offline = local_files_only or is_offline_mode()
        asked = match["revision"] or constants.DEFAULT_REVISION
        below = (match["subfolder"] or "").strip("/")
        if ".." in PurePosixPath(below).parts or ".." in asked or "\\" in below + asked:
            raise ValueError(f"{source} leaves the repository: name a revision and a subfolder of it.")
        self._repo = self.cache_dir / f"models--{self.repo_id.replace('/', '--')}"
        self._reference = self._repo / "refs" / asked
        files = self._cached(asked) if self.offline else self._listed(asked)
        self.file: str | None = None
        if below.endswith(PICKLES) and below in files:
            raise ValueError(f"{source} cannot be merged. {no_pickle(below)}")
        if below.endswith(WEIGHTS):
            self.file, below = PurePosixPath(below).name, str(PurePosixPath(below).parent)
            below = "" if below == "." else below
        self.subfolder = below
        prefix = f"{below}/" if below else ""
        self.hashes = {name.removeprefix(prefix): sha for name, sha in files.items() if name.startswith(prefix)}
        self.names: Collection[str] = self.hashes.keys()
        if not self.hashes or (self.file is not None and self.file not in self.hashes):
            folders = sorted({str(PurePosixPath(name).parent) for name in files if name.endswith(WEIGHTS)})
            raise FileNotFoundError(
                f"{source} is not in {self.repo_id} at commit {self.revision[:12]}"
                + (", as far as the cache has it" if self.offline else "")
                + f": folders with safetensors there are {folders}."
            )

    def _listed(self, asked: str) -> dict[str, str | None]:
        """Files of the repository, with the SHA-256 of those that are stored as large ones."""
        api, timeout = HfApi(token=self._token), constants.HF_HUB_DOWNLOAD_TIMEOUT  # by default it waits for ever
        info = with_retries(
            lambda: api.model_info(self.repo_id, revision=asked, files_metadata=True, timeout=timeout),
            f"reading {self.name}",
            self.repo_id,
        )
        self.revision: str = info.sha
        return {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings}

    def _cached(self, asked: str) -> dict[str, str | None]:
        """The same of what the cache holds (its layout is documented by huggingface_hub)."""
        self.revision = self._reference.read_text() if self._reference.is_file() else asked
        snapshot = self._repo / "snapshots" / self.revision
        if not _COMMIT.fullmatch(self.revision) or not snapshot.is_dir():
            raise FileNotFoundError(
                f"{self.name} is not in the cache at {self.cache_dir}: make the pool once with the network."
            )
        return {path.relative_to(snapshot).as_posix(): None for path in snapshot.rglob("*") if path.is_file()}

    def _in_repo(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def path(self, name: str) -> Path:
        """The file in the cache, downloaded if it is not there."""
        file = with_retries(
            lambda: hf_hub_download(
                self.repo_id,
                self._in_repo(name),
                revision=self.revision,
                cache_dir=self.cache_dir,
                etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
                token=self._token,
                local_files_only=self.offline,
            ),
            f"downloading {self._in_repo(name)} of {self.name}",
            self.repo_id,
        )
        return Path(file)

    def read_text(self, name: str) -> str:
        return self.path(name).read_text()

    def header(self, name: str) -> dict[str, TensorSpec]:
        """
        Tensors of a safetensors file, from its first bytes.

        A file that is cached already is read there; one whose server sends no part of it is downloaded, once.
        """
        cached = try_to_load_from_cache(
            self.repo_id, self._in_repo(name), cache_dir=self.cache_dir, revision=self.revision
        )
        if not isinstance(cached, str):
            header = with_retries(lambda: self._fetch_header(name), f"reading {self.name}", self.repo_id)
            if header is not None:
                return parse_header(header, None, f"{name} of {self.name}")
        return read_header(self.path(name), f"{name} of {self.name}")

    def _fetch_header(self, name: str) -> bytes | None:
        url = hf_hub_url(self.repo_id, self._in_repo(name), revision=self.revision, endpoint=constants.ENDPOINT)
        data, wanted = b"", _FIRST_BYTES
        while len(data) < wanted:
            span = {"Range": f"bytes={len(data)}-{wanted - 1}"}
            headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity", **span}
            with get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    return None
                part = response.read()
            data += part
            end = 8 + header_length(data, f"{name} of {self.name}")
            if len(data) >= end:
                return data[8:end]
            if not part:
                break
            wanted = end
        raise ValueError(f"{name} of {self.name} ends within its header: it was cut short; upload it again.")

    def member(self, paths: Mapping[str, Path]) -> PoolMember:
        if not self.offline and self._reference.name != self.revision:
            # so that the cache also knows the branch or tag: only commits were asked for by name
            self._reference.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._reference, lambda partial: partial.write_text(self.revision))
        files = tuple(PoolFile(name, path, self.hashes[name]) for name, path in paths.items())
        return PoolMember(self.name, files, repo_id=self.repo_id, revision=self.revision, subfolder=self.subfolder)
