"""A hub on the loopback for tests/model/test_hub.py: the few parts of huggingface.co's HTTP
interface that clients use to list a repository and to download from it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Repositories by name, each with the content of its files by path.

    private: repositories that nobody sees without `token`; gated: everybody sees them, but
        downloads without it are refused. down: every answer is an error.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.token = "hf_" + "a" * 34
        self.down = False
        self.downloads: list[str] = []  # paths, in the order in which they were asked for
        self.tokens: set[str | None] = set()


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    class Handler(_Handler):
        hub: SmallHub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = SmallHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: SmallHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        bearer = self.headers.get("Authorization")
        self.hub.tokens.add(None if bearer is None else bearer.removeprefix("Bearer "))
        path = self.path.split("?")[0]
        if self.hub.down:
            self._failed(503, "Maintenance", "down for a while")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(refs|tree/.+)", path):
            if self._may_see(found[1]):
                self._json(self._refs() if found[2] == "refs" else self._tree(found[1]))
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:{COMMIT}|main)/(.+)", path):
            if self._may_see(found[1]) and self._may_read(found[1]):
                self._file(found[1], found[2])
        else:
            self._failed(404, "EntryNotFound", f"no {path}")

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_see(self, repo: str) -> bool:
        # the Hub answers alike for private repositories and for missing ones
        hidden = repo not in self.hub.repositories
        if hidden or (repo in self.hub.private and not self._authorized()):
            self._failed(401, "RepoNotFound", "Repository not found")
            return False
        return True

    def _may_read(self, repo: str) -> bool:
        if repo in self.hub.gated and not self._authorized():
            self._failed(403, "GatedRepo", f"Access to model {repo} is restricted")
            return False
        return True

    def _refs(self) -> dict[str, Any]:
        other = {"name": "dev", "ref": "refs/heads/dev", "targetCommit": "f" * 40}
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
        return {"branches": [other, main], "tags": [], "converts": []}

    def _tree(self, repo: str) -> list[dict[str, Any]]:
        files = self.hub.repositories[repo]
        folders = {path.rpartition("/")[0] for path in files} - {""}
        return [
            *({"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in folders),
            *(
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                    "lfs": {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    },
                }
                for path, content in sorted(files.items())
            ),
        ]

    def _file(self, repo: str, path: str) -> None:
        content = self.hub.repositories[repo].get(path)
        if content is None:
            self._failed(404, "EntryNotFound", f"no {path}")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET":
            self.hub.downloads.append(path)
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag)
        self.send_header("X-Linked-Etag", etag)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self._body(content[start:], "application/octet-stream")

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self._body(json.dumps(value).encode(), "application/json")

    def _failed(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self._body(json.dumps({"error": message}).encode(), "application/json")

    def _body(self, content: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
