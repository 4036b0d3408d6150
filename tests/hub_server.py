# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the Hub on this machine: creates, commits, branches, lists and serves repositories in memory."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

from trl_distreward import hub


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repos (`dict[str, list]`): commits of all branches, oldest first: `(oid, {path: bytes}, message)`.
        branches (`dict[str, dict[str, str]]`): heads by repository and name; the first commit makes `main`.
        gated, private (`dict[str, str]`): repositories, with the one token that may read them.
        storage (`str`, *optional*): another server, to which requests for files are redirected.
        served (`list[tuple[str, str, int]]`): method, path and sent bytes of every request for a file.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.branches, self.served = {}, {}, []
        self.gated, self.private, self.storage = {}, {}, None
        self.faults, self.closing = [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def shutdown(self):
        self.closing.set()
        super().shutdown()

    def misbehave(self, method, part, fault, times=1):
        """
        Makes the next `times` requests of `method` fail whose path contains `part`. `fault` is a status, `"silence"`
        (no answer), `"reset"` (connection closed), `"cut"` (half the body), `"short"` (half the file, as if it were
        the whole) or `"commit and reset"` (the commit is made, but its answer is lost).
        """
        self.faults += [(method, part, fault)] * times

    def fault_of(self, method, path):
        for index, (wanted, part, _) in enumerate(self.faults):
            if method == wanted and part in path:
                return self.faults.pop(index)[2]
        return None

    def add(self, repo_id, files, branch="main"):
        """Commits files and returns the commit's hash."""
        values = [{"path": path, "content": base64.b64encode(data)} for path, data in files.items()]
        operations = [{"key": "file", "value": value} for value in values]
        self.repos.setdefault(repo_id, [])
        return self.commit(repo_id, operations, branch)

    def commit(self, repo_id, operations, branch="main"):
        commits, heads = self.repos[repo_id], self.branches.setdefault(repo_id, {})
        files = dict(self.revision(repo_id, heads[branch])[1]) if branch in heads else {}
        message = ""
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = hashlib.sha1(f"{repo_id}/{len(commits)}".encode()).hexdigest()
        commits.append((oid, files, message))
        heads[branch] = oid
        return oid

    def revision(self, repo_id, revision):
        oid = self.branches.get(repo_id, {}).get(revision, revision)
        return next((commit for commit in self.repos.get(repo_id, []) if commit[0] == oid), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault = None

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        keep = len(data) // 2 if self.fault == "cut" else None
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:keep])
        if keep is not None:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def misbehaves(self):
        """Whether a fault ended the request; `self.fault` keeps one that acts on the answer."""
        self.fault = self.server.fault_of(self.command, unquote(self.path))
        if isinstance(self.fault, int):
            self.answer(self.fault, {"error": f"token {self.headers.get('Authorization')} is out of order"})
        elif self.fault == "silence":
            self.server.closing.wait(60)
            self.close_connection = True
        elif self.fault == "reset":
            self.hang_up()
        return isinstance(self.fault, int) or self.fault in ("silence", "reset")

    def refused(self, repo_id):
        """Whether the request may not see the repository, which is answered."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.server.private.get(repo_id, token) != token:
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif self.server.gated.get(repo_id, token) != token:
            self.answer(403, {"error": f"gated for {token}"}, {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.misbehaves():
            return None
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo_id, [])
            return self.answer(200, {"url": f"{self.server.url}/{repo_id}", "id": repo_id})
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        repo_id, action = "/".join(parts[2:4]), parts[4]
        if self.refused(repo_id):
            return None
        if action == "preupload":
            known = self.server.revision(repo_id, parts[5])
            files = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": git_oid(known, path)}
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            return self.answer(200, {"files": files})
        if action == "commit":
            oid = self.server.commit(repo_id, [json.loads(line) for line in body.splitlines()], parts[5])
            if self.fault == "commit and reset":
                return self.hang_up()
            return self.answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})
        if action == "branch":
            heads = self.server.branches.setdefault(repo_id, {})
            heads["/".join(parts[5:])] = json.loads(body or b"{}").get("startingPoint") or heads["main"]
            return self.answer(200, {})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.misbehaves():
            return None
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self.refused(repo_id):
            return None
        if repo_id not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if parts[:2] == ["api", "models"]:
            found = self.server.revision(repo_id, parts[5] if len(parts) > 5 else "main")
            if found is None:
                return self.answer(404, {"error": "not found"}, {"X-Error-Code": "RevisionNotFound"})
            oid, files, _ = found
            if len(parts) > 4 and parts[4] == "tree":
                listed = [{"type": "file", "path": p, "size": len(d), "oid": oid} for p, d in files.items()]
                return self.answer(200, listed)
            siblings = [{"rfilename": path, "size": len(data), "blobId": "0" * 40} for path, data in files.items()]
            return self.answer(200, {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": oid, "siblings": siblings})
        if "resolve" in parts:
            found = self.server.revision(repo_id, parts[3])
            path = "/".join(parts[4:])
            if found is None or path not in found[1]:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.serve(path, found[1][path], found[0])
        return self.answer(404, {"error": self.path})

    do_HEAD = do_GET

    def serve(self, path, data, oid):
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if self.server.storage:
            linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
            target = f"{self.server.storage}/org/a/resolve/main/{path}"
            return self.answer(302, b"", {"X-Repo-Commit": oid, "Location": target, **linked})
        asked, status, size = self.headers.get("Range"), 200, len(data)
        if self.fault == "short":
            data = data[: size // 2]
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or size - 1), size - 1)
            if first >= size:
                return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            status, data = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.server.served.append((self.command, path, 0 if self.command == "HEAD" else len(data)))
        return self.answer(status, data, headers)


def git_oid(commit, path):
    """Returns git's hash of a file in a commit; the client does not upload a file with the same hash."""
    if commit is None or path not in commit[1]:
        return None
    data = commit[1][path]
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def run_code(server, home, code, *arguments, **environment):
    """Runs Python code in a process whose Hub is the stand-in, with an empty cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    address = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    python = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**kept, **address, **python, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def connect(monkeypatch, server, home):
    """Points huggingface_hub in this process to a stand-in with an empty cache, and shortens its waits."""
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        **dict.fromkeys(("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_REQUEST_TIMEOUT"), 0.3),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # else it keeps the address of its first use
    monkeypatch.setattr(hub, "BACKOFF", 0.0)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
