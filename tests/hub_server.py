# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the Hub on loopback: creates, commits, lists and serves model repositories kept in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """`repos[repo_id]` is a list of commits, oldest first: `(oid, {path: bytes}, message)`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests, self.fail_commits = {}, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo_id, operations):
        commits = self.repos[repo_id]
        files = dict(commits[-1][1]) if commits else {}
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
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append((self.path, body))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo_id, [])
            return self.answer(200, {"url": f"{self.server.url}/{repo_id}", "id": repo_id})
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        repo_id, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "commit":
            if self.server.fail_commits:
                self.server.fail_commits -= 1
                return self.answer(500, {"error": "out of order"})
            oid = self.server.commit(repo_id, [json.loads(line) for line in body.splitlines()])
            return self.answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            found = self.revision("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if found is None:
                return self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            oid, files, _ = found
            if len(parts) > 4 and parts[4] == "tree":
                listed = [{"type": "file", "path": p, "size": len(d), "oid": oid} for p, d in files.items()]
                return self.answer(200, listed)
            siblings = [{"rfilename": path} for path in files]
            repo_id = "/".join(parts[2:4])
            return self.answer(200, {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": oid, "siblings": siblings})
        if "resolve" in parts:
            found = self.revision("/".join(parts[:2]), parts[3])
            path = "/".join(parts[4:])
            if found is None or path not in found[1]:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = found[1][path]
            etag = hashlib.sha256(data).hexdigest()
            return self.answer(200, data, {"X-Repo-Commit": found[0], "ETag": f'"{etag}"'})
        return self.answer(404, {"error": self.path})

    do_HEAD = do_GET

    def revision(self, repo_id, revision):
        commits = self.server.repos.get(repo_id) or []
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)
