# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Retries of calls to the Hub. Errors are explained by their status alone: a server's text may repeat a token."""

import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub import errors as hf

T = TypeVar("T")

ATTEMPTS = 4
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
LOG_IN = "log in with `hf auth login`, or pass a token that may read it"

# huggingface_hub's error, subclasses first; the error that is raised in its place; its message
_EXPLAINED: list[tuple[type[Exception], type[OSError], str]] = [
    (hf.GatedRepoError, PermissionError, f"access to {{}} is gated: accept its terms on the Hub, then {LOG_IN}"),
    (hf.RepositoryNotFoundError, FileNotFoundError, f"there is no repository {{}}, or it is private: {LOG_IN}"),
    (hf.RevisionNotFoundError, FileNotFoundError, "{} has no such branch, tag or commit: check the revision"),
    (hf.LocalEntryNotFoundError, FileNotFoundError, "{} is not in the cache: run once with the network"),
    (hf.EntryNotFoundError, FileNotFoundError, "{} has no such file at this revision"),
    (hf.OfflineModeIsEnabled, ConnectionError, "HF_HUB_OFFLINE is set, so {} cannot be reached: unset it"),
]


def without_tokens(text: str) -> str:
    """Replaces anything that looks like a token of the Hub."""
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)


def with_retries(call: Callable[[], T], what: str, repo_id: str) -> T:
    """Calls again after server errors and timeouts; what the Hub refuses is raised in words, as an `OSError`."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (hf.HTTPError, OSError, hf.EntryNotFoundError, RuntimeError) as raised:
            # errors about files hide the server's answer in their cause
            hides = isinstance(raised, hf.LocalEntryNotFoundError | RuntimeError)
            error = raised.__cause__ if hides and isinstance(raised.__cause__, hf.HTTPError | OSError) else raised
            status = getattr(getattr(error, "response", None), "status_code", None)
            for known, kind, reason in _EXPLAINED:
                if isinstance(error, known):
                    raise kind(f"{what}: {reason.format(repo_id)}.") from None
            if status in (401, 403):
                raise PermissionError(f"{what}: the Hub refused {repo_id} (HTTP {status}): {LOG_IN}.") from None
            if status is not None and status < 500 and status not in (408, 429):
                raise OSError(f"{what}: the Hub answered with HTTP {status}.") from None
            cut_short = type(error) is OSError and not error.errno  # a file of another size than was announced
            if not (isinstance(error, hf.HTTPError | ConnectionError | TimeoutError) or cut_short):
                raise  # a full disk, a folder that cannot be written, an error of the program
            last = f"HTTP {status}" if status is not None else type(error).__name__
        if attempt < ATTEMPTS - 1:
            time.sleep(BACKOFF * 2**attempt)
    raise ConnectionError(f"{what}: the Hub failed in {ATTEMPTS} attempts, lastly with {last}: try again later.")


def push_folder(folder: str | os.PathLike, repo_id: str, **kwargs: object) -> CommitInfo:
    """Uploads a folder to an existing repository as one commit; see [`~huggingface_hub.HfApi.upload_folder`]."""
    upload = partial(HfApi().upload_folder, repo_id=repo_id, folder_path=folder, **kwargs)
    return with_retries(upload, f"pushing to {repo_id}", repo_id)
