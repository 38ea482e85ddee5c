"""A base by its hub id and revision, downloaded from a stand-in of the hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import write_recipe

NAME, REVISION, COMMIT = "ann/base", "v1.2", "c" * 40
UNWANTED = (
    "pytorch_model.bin",
    "modeling_own.py",
    "README.md",
    "original/model.safetensors",
    "metal/model.safetensors",
)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(its address, the paths that were asked for): one model, `folder`, under one revision."""
    asked: list[str] = []
    names = [*sorted(f.name for f in folder.iterdir()), *UNWANTED]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            if path == f"/api/models/{NAME}/revision/{REVISION}":
                known = [{"rfilename": n} for n in names]
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": known}).encode())
            elif path == f"/api/models/{NAME}/tree/{COMMIT}":
                self.answer(json.dumps([{"type": "file", "path": n, "size": 1, "oid": n} for n in names]).encode())
            elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
                self.answer((folder / path.rsplit("/", 1)[1]).read_bytes())
            else:
                self.answer(b'{"error": "Revision Not Found"}', 404)

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("ETag", f'"{len(body)}-{hash(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def check(project: Path, tmp: Path, url: str, revision: str) -> subprocess.CompletedProcess[str]:
    """`requant check` of the project with its base on the hub, in a process that may ask it."""
    for item in project.iterdir():
        if item.name != "base" and not (tmp / item.name).exists():
            (tmp / item.name).symlink_to(item, target_is_directory=item.is_dir())
    name = f"{revision}.yaml"
    write_recipe(tmp, {"base.model": NAME, "base.revision": revision, "output.dir": str(tmp / "runs")}, name)
    env = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp / "cache"),
        "HF_HUB_CACHE": str(tmp / "cache" / "hub"),  # libraries that were imported here may have set another one
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", "from requant.cli import main; main()", "check", name]
    return subprocess.run(command, cwd=tmp, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_base_by_hub_id_and_revision(project: Path, tmp_path: Path) -> None:
    with hub(project / "base") as (url, asked):
        done = check(project, tmp_path, url, REVISION)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("ok\n")
        fetched = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
        assert not fetched & set(UNWANTED)
        other = check(project, tmp_path, url, "v9")
    assert other.returncode == 2
    assert (
        f"{NAME}: no such local directory, and the hub does not give it: 404 Client Error. Revision Not Found"
        in other.stderr
    )
