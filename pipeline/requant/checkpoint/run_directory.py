"""A run directory: whole artifacts, results of finished stages, and a lock.

An artifact is written as `.NAME.partial-KEY`; its manifest is written last, then it is renamed. KEY is the digest of
all that the artifact depends on, so files of an interrupted run are used again only for the same inputs and settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requant.checkpoint.atomic_write import write_text
from requant.checkpoint.model_files import files_of
from requant.checkpoint.reader import file_digest, read_json
from requant.errors import InputError, StageError
from requant.outgoing import everywhere, shared
from requant_eval.escaping import visible

MARKER = ".requant.json"
MANIFEST = "manifest.json"
LATE = frozenset({"README.md", MANIFEST})  # written after the artifact is whole


def key_of(*parts: Any) -> str:
    """sha256 (hex) of JSON-able parts: the name of everything a stage's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class RunDirectory:
    """`runs/NAME`; created on the first `open`.

    Raises InputError when it is a directory that requant did not make.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raise InputError when the directory exists and is not ours."""
        if self.path.exists() and not (self.path / MARKER).exists():
            if not self.path.is_dir():
                raise InputError(f"{self.path}: is a file: choose another name or output.dir")
            if any(self.path.iterdir()):
                raise InputError(f"{self.path}: exists and was not made by requant: choose another name or output.dir")

    @contextmanager
    def open(self) -> Iterator[RunDirectory]:
        """Create or take the directory and hold its lock.

        A second run of the same name is refused meanwhile.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / MARKER).open("a+")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}): choose another output.dir") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another requant is running here: wait for it or stop it") from None
            if not (self.path / MARKER).stat().st_size:
                handle.write('{"made_by": "requant", "layout": 1}\n')
                handle.flush()
            yield self

    @property
    def cache(self) -> Path:
        """Scores and reference states of finished variants."""
        path = self.path / ".cache"
        path.mkdir(exist_ok=True)
        return path

    def scratch(self, stage: str, key: str) -> Path:
        """Directory of a stage's intermediate files, from which it resumes; it is not created here.

        Directories of other keys are removed.
        """
        path = self.cache / f"{stage}-{key[:16]}"
        for other in self.cache.glob(f"{stage}-*/"):
            if other != path:
                shutil.rmtree(other)
        return path

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.path, name)

    def result(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `remember` kept for this stage, if its key is still the same."""
        entry = self._results().get(stage)
        return entry["result"] if entry and entry["key"] == key else None

    def remember(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Keep a stage's result, without secrets and places of this machine (`outgoing.shared`)."""
        results = self._results() | {stage: {"key": key, "result": everywhere(result, shared)}}
        write_text(self.path / ".stages.json", json.dumps(results, indent=1) + "\n")

    def _results(self) -> dict[str, Any]:
        file = self.path / ".stages.json"
        return read_json(file, constants=True) if file.exists() else {}

    def digest(self, file: Path) -> str:
        """sha256 of a file, remembered by its path, size and time.

        A hub cache names its blobs by their sha256.
        """
        real = file.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name
        memory = self.path / ".digests.json"
        known = read_json(memory) if memory.exists() else {}
        stat = real.stat()
        stamp = key_of(str(real), stat.st_size, stat.st_mtime_ns)  # a digest: no file of a run says where inputs lie
        if stamp not in known:
            known[stamp] = file_digest(real)
            write_text(memory, json.dumps(known, indent=1) + "\n")
        return str(known[stamp])

    def fingerprint(self, directory: Path) -> str:
        """Digest of a model or adapter directory: every file that a run reads, by name and content."""
        suffixes = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
        files = [f for f in files_of(directory) if f.suffix in suffixes]
        return key_of([(f.relative_to(directory).as_posix(), self.digest(f)) for f in files])


class Artifact:
    """A directory inside the run directory that is whole or absent.

    Whole: its manifest lists its files.
    """

    def __init__(self, parent: Path, name: str) -> None:
        self.parent, self.name, self.path = parent, name, parent / name

    def whole(self, key: str) -> bool:
        """Whether the finished artifact belongs to `key` and still has all its files at their sizes."""
        manifest = self._manifest(self.path)
        if manifest is None or manifest["key"] != key:
            return False
        return all(
            (self.path / n).is_file() and (self.path / n).stat().st_size == size
            for n, size in manifest["files"].items()
        )

    def of_another(self, key: str) -> bool:
        """Whether a finished artifact is there that `finish` of `key` will replace."""
        manifest = self._manifest(self.path)
        return manifest is not None and manifest["key"] != key

    def begin(self, key: str) -> Path:
        """The directory to write into: that of an interrupted run with the same key, or a new one."""
        if self.path.exists() and self._manifest(self.path) is None:
            raise InputError(f"{self.path}: exists without requant's manifest: not overwritten; move it away")
        partial = self.parent / f".{self.name}.partial-{key[:16]}"
        for other in self.parent.glob(f".{self.name}.partial-*"):
            if other != partial:
                shutil.rmtree(other)
        partial.mkdir(exist_ok=True)
        return partial

    def finish(self, key: str, provenance: dict[str, Any]) -> None:
        """Write the manifest, then put the artifact in place of an older one of ours."""
        partial = self.parent / f".{self.name}.partial-{key[:16]}"
        written = [f for f in files_of(partial) if f.name not in LATE]
        files = {f.relative_to(partial).as_posix(): f.stat().st_size for f in written}
        manifest = {"key": key, "files": files, "provenance": provenance}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        old = self.parent / f".{self.name}.old"
        try:
            if self.path.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.path.rename(old)
            partial.rename(self.path)
            directory = os.open(self.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        except OSError as error:
            raise StageError(f"{self.path}: cannot be put in place: {error.strerror}") from error
        shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Delete the artifact if it is ours."""
        if self._manifest(self.path) is not None:
            shutil.rmtree(self.path)

    @staticmethod
    def _manifest(path: Path) -> dict[str, Any] | None:
        file = path / MANIFEST
        if not file.exists():
            return None
        manifest = read_json(file)
        return manifest if {"key", "files"} <= manifest.keys() else None


class _LogLine(logging.Formatter):
    """One record, without secrets, places of this machine and control characters; further lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(shared(super().format(record))).replace("\n", "\n    ")


class LogFile:
    """Attach a file handler to our loggers for the time of a `with`."""

    def __init__(self, file: Path) -> None:
        self.handler = logging.FileHandler(file, encoding="utf-8")
        self.handler.setFormatter(_LogLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.logger = logging.getLogger("requant")

    def __enter__(self) -> None:
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self.handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if error is not None:
            self.logger.error("stopped: %s", str(error) or type(error).__name__)
        self.logger.removeHandler(self.handler)
        self.handler.close()
