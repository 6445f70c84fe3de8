"""A Hub on this machine: the part of its API that uploading takes, in a small HTTP server.

Repositories are kept in memory. Large files go the way of LFS, as on the real one: announced,
sent to an address of their own, and named by hash in the commit.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LARGE = (".safetensors", ".gguf")


class FakeHub:
    """The repositories, and what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.before_commit: Any = lambda: None
        self.address = ""

    def head(self, repo: str) -> str:
        """Return a commit id that changes with the files."""
        digest = sha256(repr(sorted(self.repos[repo].items())).encode())
        return digest.hexdigest()[:40]

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        self.before_commit()
        header = lines[0]["value"]
        wanted = header.get("parentCommit")
        if wanted is not None and wanted != self.head(repo):
            return 412, {"error": "the repository has changed since"}
        files = dict(self.repos[repo])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"unknown key {kind}"}
        self.repos[repo] = files
        self.commits.append(header["summary"])
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": self.head(repo),
                     "success": True}  # fmt: skip

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT" and path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if method == "POST" and path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked.get("organization") or "me", asked["name"]
            if owner == "forbidden":
                return 403, {"error": "You may not write here."}
            repo = f"{owner}/{name}"
            exists = repo in self.repos
            self.repos.setdefault(repo, {".gitattributes": b""})
            self.private.setdefault(
                repo, asked.get("private") or asked.get("visibility") == "private"
            )
            status = 409 if exists else 200
            return status, {"url": f"{self.address}/{repo}", "error": "exists"}
        if method == "POST" and path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            entries = [
                {**entry, "actions": {"upload": {"href": f"{self.address}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": entries}
        if not path.startswith("/api/models/"):
            return 404, {"error": f"no such place: {path}"}
        parts = path.removeprefix("/api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        files = self.repos[repo]
        if not rest or rest[0] == "revision":
            names = [{"rfilename": name} for name in sorted(files)]
            return 200, {"id": repo, "sha": self.head(repo), "siblings": names, "private": False,
                         "tags": []}  # fmt: skip
        if rest[0] == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in sorted(files.items())
            ]
        if rest[0] == "preupload":
            return 200, {"files": [
                {"path": entry["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if entry["path"].endswith(LARGE) else "regular"}
                for entry in json.loads(body)["files"]
            ]}  # fmt: skip
        if rest[0] == "commit":
            return self.commit(repo, [json.loads(line) for line in body.splitlines() if line])
        return 404, {"error": f"no such place: {path}"}


@contextmanager
def running() -> Generator[FakeHub]:
    """Serve a fake Hub until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self._body()
            status, values = hub.answer(self.command, urlsplit(self.path).path, body)
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
