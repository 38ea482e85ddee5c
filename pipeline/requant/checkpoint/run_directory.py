"""A run directory: whole artifacts, results of finished stages, and a lock.

An artifact is written as `.NAME.partial-KEY`; its manifest is written last, then it is renamed. KEY is the digest of
all that the artifact depends on, so files of an interrupted run are used again only for the same inputs and settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from requant.checkpoint.artifact import Artifact
from requant.checkpoint.atomic_write import DAMAGED, link_file, make_directory, read_state, write_text, writing
from requant.checkpoint.digests import DIGESTS, hub_blob
from requant.checkpoint.model_files import files_of
from requant.checkpoint.reader import read_json
from requant.errors import InputError
from requant.outgoing import everywhere, shared
from requant_eval import strict_json, whole_files
from requant_eval.escaping import visible

MARKER = ".requant.json"
CACHE = ".cache"
STAGES, KNOWN = ".stages.json", ".digests.json"
SEAL = "sha256"  # key of a state's digest
OWN_FILES = (MARKER, "log.txt", "events.jsonl")  # that grow or are locked: they are not replaced as others are
ARTIFACTS = ("merged", "gptq", "healed", "gptqmodel", "compressed-tensors", "auto-round", "mlx", "gguf")


def key_of(*parts: Any) -> str:
    """sha256 (hex) of JSON-able parts: the name of everything a stage's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it is written, with the digest of what JSON keeps of it."""
    kept = strict_json.parse(json.dumps(state), constants=True)
    return {**kept, SEAL: key_of(kept)}


def unsealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `sealed` was given; ValueError where it was changed since."""
    state = {key: value for key, value in found.items() if key != SEAL}
    if found.get(SEAL) != key_of(state):
        raise ValueError("its bytes have changed" if SEAL in found else "it has no checksum")
    return state


class RunDirectory:
    """`runs/NAME`; created on the first `open`.

    Raises InputError when it is a directory that requant did not make, or when one of the directories that a run
    writes into is a link (the run directory itself may be one). beside: directories of other runs, whose results
    under the same keys, and files of the same names, are taken over (`requant sweep`).
    """

    def __init__(self, path: Path, beside: Sequence[Path] = ()) -> None:
        self.path, self.beside = path, tuple(beside)

    def check(self) -> None:
        """Raise InputError when the directory exists and is not ours, or cannot be made or written."""
        place = next(p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p))
        if not place.is_dir() and not self.path.exists():
            raise InputError(f"{self.path}: cannot be written: {place} is no directory: choose another output.dir")
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"{place}: cannot be written (no permission): choose another output.dir")
        if self.path.exists() and not (self.path / MARKER).exists():
            if not self.path.is_dir():
                raise InputError(f"{self.path}: is a file: choose another name or output.dir")
            if any(self.path.iterdir()):
                raise InputError(f"{self.path}: exists and was not made by requant: choose another name or output.dir")
        for name in (*OWN_FILES, CACHE, *ARTIFACTS):
            if (self.path / name).is_symlink():
                raise InputError(
                    f"{self.path / name}: is a link to {(self.path / name).readlink()}: requant writes through no link "
                    "inside of a run: remove it; to keep runs elsewhere set output.dir, or link the whole run directory"
                )

    @contextmanager
    def open(self) -> Iterator[RunDirectory]:
        """Create or take the directory and hold its lock; what killed processes left half-written is removed.

        A second run of the same name is refused meanwhile.
        """
        self.check()
        try:
            if not self.path.is_dir():
                whole_files.make_directory(self.path)
            handle = whole_files.open_to_append(self.path / MARKER)
        except OSError as error:
            why = whole_files.reason(error, self.path)
            raise InputError(f"{self.path}: cannot be written ({why}): choose another output.dir") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another requant is running here: wait for it or stop it") from None
            with writing(self.path / MARKER):
                if not os.fstat(handle.fileno()).st_size:
                    handle.write(b'{"made_by": "requant", "layout": 1}\n')
                    os.fsync(handle.fileno())
                    whole_files.sync_directory(self.path)
                for directory in (self.path, *self.path.glob(f"{CACHE}/**/")):
                    whole_files.sweep(directory)
            DIGESTS.learn(self._digests())
            yield self

    @property
    def cache(self) -> Path:
        """Scores and reference states of finished variants."""
        return make_directory(self.path / CACHE)

    def scratch(self, stage: str, key: str) -> Path:
        """Directory of a stage's intermediate files, from which it resumes; it is not created here.

        Directories of other keys are removed.
        """
        path = self.cache / f"{stage}-{key[:16]}"
        for other in self.cache.glob(f"{stage}-*"):
            if other != path and (other.is_symlink() or other.is_dir()):
                whole_files.remove(other)
        return path

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.path, name, self.digests)

    def result(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `remember` kept for this stage, if its key is still the same, here or in a directory beside."""
        for path in (self.path, *self.beside):
            entry = _entries(path).get(stage)
            if entry and entry["key"] == key:
                if path != self.path:
                    self.remember(stage, key, entry["result"])
                return entry["result"]  # type: ignore[no-any-return]
        return None

    def take_artifact(self, name: str, key: str) -> bool:
        """Take an artifact over from the first directory beside that holds it; whether one did."""
        return any(self.artifact(name).take(path, key) for path in self.beside)

    def take_cached(self, name: str) -> bool:
        """Take a file of the cache over from the first directory beside that holds it; whether one did."""
        found = next((path / CACHE / name for path in self.beside if (path / CACHE / name).is_file()), None)
        if found is None or os.path.lexists(self.cache / name):
            return False
        link_file(found, self.cache / name)
        return True

    def remember(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Keep a stage's result, without secrets and places of this machine (`outgoing.shared`)."""
        results = {n: sealed(r) for n, r in _entries(self.path).items()} | {
            stage: sealed({"key": key, "result": everywhere(result, shared)})
        }
        write_text(self.path / STAGES, json.dumps(results, indent=1) + "\n")

    def digests(self, files: Sequence[Path]) -> list[str]:
        """The sha256 of each file, remembered while the file stays what it was (`checkpoint.digests`).

        The hub's cache names its blobs by their sha256. No file of a run says where its inputs lie.
        """
        named = {file: blob for file in files if (blob := hub_blob(file))}
        made = dict(zip(others := [f for f in files if f not in named], DIGESTS.of_all(others), strict=True))
        known = {key_of(str(f.resolve())): kept for f in others if (kept := DIGESTS.remembered(f))}
        before = read_state(self.path / KNOWN, _known_digests) or {}
        if known.items() - before.items():
            write_text(self.path / KNOWN, json.dumps(sealed(before | known), indent=1) + "\n")
        return [named.get(file) or made[file] for file in files]

    def _digests(self) -> dict[str, str]:
        """Stamp -> digest, of an earlier process."""
        return dict((read_state(self.path / KNOWN, _known_digests) or {}).values())

    def fingerprint(self, directory: Path) -> str:
        """Digest of a model or adapter directory: every file that a run reads, by name and content."""
        suffixes = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
        files = [f for f in files_of(directory) if f.suffix in suffixes]
        return key_of(
            [(f.relative_to(directory).as_posix(), d) for f, d in zip(files, self.digests(files), strict=True)]
        )


def _entries(run: Path) -> dict[str, Any]:
    """The stored results of a run."""
    return read_state(run / STAGES, _results) or {}


def _results(file: Path) -> dict[str, Any]:
    """Stage -> key and result; ValueError where the file holds something else."""
    results = read_json(file, constants=True)
    for entry in results.values():
        if not isinstance(entry, dict) or not isinstance(entry["key"], str) or not isinstance(entry["result"], dict):
            raise ValueError("it holds no results of stages")
    return {stage: unsealed(entry) for stage, entry in results.items()}


def _known_digests(file: Path) -> dict[str, tuple[str, str]]:
    """Path -> (stamp, sha256); ValueError where the file holds something else."""
    known = unsealed(read_json(file))
    if not all(isinstance(e, list) and len(e) == 2 and all(isinstance(t, str) for t in e) for e in known.values()):
        raise ValueError("it holds no digests")
    return {path: (stamp, digest) for path, (stamp, digest) in known.items()}


class _LogLine(logging.Formatter):
    """One record, without secrets, places of this machine and control characters; further lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(shared(super().format(record))).replace("\n", "\n    ")


class LogFile:
    """Attach a file handler to our loggers for the time of a `with`; a log that cannot be written stops no run."""

    def __init__(self, file: Path) -> None:
        try:
            stream = io.TextIOWrapper(whole_files.open_to_append(file), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({whole_files.reason(error, file)})") from error
        self.handler = _LogHandler(stream, file)
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
        with suppress(OSError, ValueError):
            self.handler.stream.close()


class _LogHandler(logging.StreamHandler[io.TextIOWrapper]):
    """A handler that says once that its file cannot be written, in place of a traceback a line."""

    def __init__(self, stream: io.TextIOWrapper, file: Path) -> None:
        super().__init__(stream)
        self.file, self.failed = file, False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True  # first: the line below comes here too
            error = sys.exc_info()[1]
            why = whole_files.reason(error, self.file) if isinstance(error, OSError) else str(error)
            DAMAGED.warning("%s: cannot be written (%s): the run goes on without it", self.file, why)
