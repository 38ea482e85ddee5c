"""A stand-in for the hub's HTTP API on loopback: repositories, LFS uploads, commits.

Only what an upload needs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in_of_a_token"


@dataclass
class Hub:
    """State of the stand-in hub.

    `drop` holds (method, part of the path) of requests whose connection is cut, once each.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    drop: list[tuple[str, str]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in p for m, p in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, method: str) -> bytes | None:
        """The body, or None when the request is already answered (or cut)."""
        hub = self.hub
        hub.requests.append((method, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for rule in hub.drop:
            if rule[0] == method and rule[1] in self.path:
                hub.drop.remove(rule)
                self.close_connection = True
                self.connection.close()
                return None
        if not self.path.startswith("/blob/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
            return None
        return body

    def do_GET(self) -> None:
        if self._begin("GET") is None:
            return
        name = self.path.removeprefix("/api/models/").split("?")[0]
        files = self.hub.repos.get(name)
        if files is None:
            self._answer({"error": "Repository not found"}, 404)
            return
        siblings = [{"rfilename": f} for f in [".gitattributes", *files]]
        self._answer({"_id": "1", "id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings})

    def do_PUT(self) -> None:
        body = self._begin("PUT")
        if body is None:
            return
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/blob/"), "arrived as it was sent"
        self.hub.blobs[self.path.removeprefix("/blob/")] = body
        self._answer({})

    def do_POST(self) -> None:
        body = self._begin("POST")
        if body is None:
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            kinds = [self._mode(f) for f in json.loads(body)["files"]]
            self._answer({"files": kinds})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit(body)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": f"no such path {self.path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name.startswith("somebody/"):
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif name in self.hub.repos:
            self._answer({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.hub.repos[name] = {}
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self._answer({"url": url, "id": "1"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        lfs = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.blobs:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/blob/{wanted['oid']}"}}}

    def _commit(self, body: bytes) -> None:
        import base64

        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        files = self.hub.repos[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of the loopback device."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
