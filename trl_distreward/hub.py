# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Calls to the Hub that outlast a bad moment, and say plainly what went wrong when they do not.

Messages are written from the status of an answer alone: what a server or a client library says may repeat a token.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

T = TypeVar("T")

ATTEMPTS = 4
BACKOFF = 1.0  # seconds before the second attempt; doubled before each further one

REMEDY_FOR_ACCESS = "log in with `hf auth login`, or pass a token that may read it"


def without_tokens(text: str) -> str:
    """The text with everything that looks like a token of the Hub left out."""
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)


def _origin(error: BaseException) -> BaseException:
    """The answer of the server behind what huggingface_hub raises when a file cannot be located or uploaded."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):  # of a large file's upload
        return error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: after a server's error, a timeout, a connection cut short."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # huggingface_hub raises a bare OSError for a file that came in another size than was announced
    return isinstance(error, HTTPError | ConnectionError | TimeoutError) or (
        type(error) is OSError and not error.errno
    )


def explained(error: BaseException, what: str, repo_id: str) -> OSError:
    """The error as one of Python's own, with a remedy."""
    status = _status(error)
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{what}: access to {repo_id} is gated: accept its terms on its page on the Hub, then {REMEDY_FOR_ACCESS}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{what}: the Hub has no repository {repo_id} that this token may see: check the name; if it is private, "
            f"{REMEDY_FOR_ACCESS}."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{what}: {repo_id} has no such branch, tag or commit: check the part after '@'.")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(f"{what}: {repo_id} has no such file at this revision.")
    if status in (401, 403):
        return PermissionError(f"{what}: the Hub refused access to {repo_id} (HTTP {status}): {REMEDY_FOR_ACCESS}.")
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(f"{what}: HF_HUB_OFFLINE is set: unset it, or pass local_files_only=True.")
    if is_transient(error):
        reason = f"HTTP {status}" if status is not None else type(error).__name__
        return ConnectionError(
            f"{what}: the Hub did not answer as it should after several attempts, the last time with {reason}: try "
            "again later; files that came whole are kept."
        )
    return OSError(f"{what}: {f'HTTP {status}' if status is not None else type(error).__name__} from the Hub.")


def with_retries(call: Callable[[], T], what: str, repo_id: str) -> T:
    """
    Calls, and calls again after a failure that may pass, at most `ATTEMPTS` times, waiting longer each time.

    Args:
        call (`Callable`): one request or several that may be repeated.
        what (`str`): what is done, as a message begins with.
        repo_id (`str`): repository concerned.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        PermissionError: gated, private, or the token does not suffice.
        ConnectionError: server errors, timeouts or cut connections, to the last attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (HTTPError, OSError, EntryNotFoundError, RuntimeError) as raised:
            error = _origin(raised)
            of_the_hub = isinstance(error, HTTPError | EntryNotFoundError | OfflineModeIsEnabled)
            if not of_the_hub and not is_transient(error):
                raise  # of this machine: a full disk, a folder that may not be written; or of the program
            tried = isinstance(raised, LocalEntryNotFoundError)  # by huggingface_hub, again and again
            if not is_transient(error) or tried or attempt == ATTEMPTS:
                raise explained(error, what, repo_id) from None
        time.sleep(BACKOFF * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def push_folder(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> CommitInfo:
    """
    Uploads a folder as one commit, again after failures that may pass.

    A commit is on the Hub as a whole or not at all. One that was made although its answer was lost is found by the
    next attempt, which then has nothing to change.

    Args:
        folder (`str`): folder to upload.
        repo_id (`str`): repository, which must exist.
        kwargs: as in [`~huggingface_hub.HfApi.upload_folder`].

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `with_retries`; nothing was committed.
    """
    return with_retries(
        lambda: HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **kwargs), f"pushing to {repo_id}", repo_id
    )
