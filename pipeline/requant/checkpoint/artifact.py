"""An artifact of a run: a directory that is whole or absent. Whole: as its manifest says.

It is written as `.NAME.partial-KEY`. When it is finished all of its files are on the disk, then the manifest with their
sizes and digests, then the directory is renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requant.checkpoint.atomic_write import (
    DAMAGED,
    copy_file,
    link_file,
    make_directory,
    remove,
    write_text,
    writing,
)
from requant.checkpoint.digests import DIGESTS
from requant.checkpoint.model_files import files_of
from requant.checkpoint.reader import read_json
from requant.errors import InputError
from requant_eval import whole_files

MANIFEST = "manifest.json"
UNDO = "take the file from where it is whole, or remove manifest.json if the change is yours"
WEIGHTS = (".safetensors", ".gguf")  # files too large to be copied
LATE = frozenset({"README.md", MANIFEST})  # written after the artifact is whole
DigestsOf = Callable[[Sequence[Path]], list[str]]


class Artifact:
    """A directory inside the run directory that is whole or absent.

    digests: of files, those that are known already without reading the files again.
    """

    def __init__(self, parent: Path, name: str, digests: DigestsOf = DIGESTS.of_all) -> None:
        self.parent, self.name, self.path, self.digests = parent, name, parent / name, digests

    def whole(self, key: str) -> bool:
        """Whether the finished artifact belongs to `key`, and its files are those that were written.

        A line says what is not. A file that was not touched since its digest was taken is not read again.
        """
        manifest = read_manifest(self.path)
        if manifest is None or manifest["key"] != key:
            return False
        wrong = changed_files(self.path, self.digests)
        for name, reason in wrong.items():
            DAMAGED.warning("%s: %s: the stage that wrote it runs again", self.path / name, reason)
        return not wrong

    def of_another(self, key: str) -> bool:
        """Whether a finished artifact is there that `finish` of `key` will replace."""
        manifest = read_manifest(self.path)
        return manifest is not None and manifest["key"] != key

    def begin(self, key: str) -> Path:
        """The directory to write into: that of an interrupted run with the same key, or a new one."""
        if self.path.is_symlink() or (self.path.exists() and read_manifest(self.path) is None):
            raise InputError(f"{self.path}: exists without requant's manifest: not overwritten; move it away")
        partial = self.parent / f".{self.name}.partial-{key[:16]}"
        for other in self.parent.glob(f".{self.name}.partial-*"):
            if other != partial or other.is_symlink():
                whole_files.remove(other)
        make_directory(partial)
        whole_files.sweep(partial)
        return partial

    def finish(self, key: str, provenance: dict[str, Any], *, journal: str | None = None) -> None:
        """Put the files on the disk, write the manifest, then put the artifact in place of an older one of ours.

        journal: name of a file by which an interrupted run resumes; it goes last, and is no part of the artifact.
        """
        partial = self.parent / f".{self.name}.partial-{key[:16]}"
        written = [f for f in files_of(partial) if f.name not in {*LATE, journal}]
        names = [f.relative_to(partial).as_posix() for f in written]
        sync_all(written)
        manifest = {
            "key": key,
            "files": {name: file.stat().st_size for name, file in zip(names, written, strict=True)},
            "sha256": dict(zip(names, self.digests(written), strict=True)),
            "provenance": provenance,
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if journal is not None:
            remove(partial / journal)
            with writing(partial):
                whole_files.sync_directory(partial)
        self._put_in_place(partial)

    def _put_in_place(self, partial: Path) -> None:
        """Give a finished directory the artifact's name, in place of an older one of ours."""
        old = self.parent / f".{self.name}.old"
        with writing(self.path):
            if self.path.exists():
                whole_files.remove(old)
                whole_files.move(self.path, old)
            whole_files.move(partial, self.path)
            whole_files.remove(old)

    def take(self, other: Path, key: str) -> bool:
        """Take the artifact of `key` over from another run's directory; False where that one holds none.

        Only where nothing has its name here. Weights become second names of the other's files, other files copies.
        Whether it is `whole` is asked of it here as of any other.
        """
        source = other / self.name
        manifest = read_manifest(source)
        if manifest is None or manifest["key"] != key or os.path.lexists(self.path):
            return False
        if not manifest["files"].keys() <= {f.relative_to(source).as_posix() for f in files_of(source)}:
            return False
        partial = self.parent / f".{self.name}.partial-taken"  # no name that `begin` resumes from
        remove(partial)
        for name in manifest["files"]:
            (link_file if name.endswith(WEIGHTS) else copy_file)(source / name, partial / name)
        copy_file(source / MANIFEST, partial / MANIFEST)
        self._put_in_place(partial)
        return True

    def remove(self) -> None:
        """Delete the artifact if it is ours."""
        if not self.path.is_symlink() and read_manifest(self.path) is not None:
            with writing(self.path):
                whole_files.remove(self.path)


def sync_all(files: Sequence[Path]) -> None:
    """Wait until files, and their names in their directories, are on the disk."""
    for file in files:
        with writing(file):
            whole_files.sync_file(file)
    for directory in {file.parent for file in files}:
        with writing(directory):
            whole_files.sync_directory(directory)


def put_in_place(made: Path, out: Path) -> None:
    """Give a finished directory its name, once its files are on the disk."""
    sync_all(files_of(made))
    with writing(out):
        whole_files.move(made, out)


def require_new(out: Path) -> None:
    """Raise InputError when `out` exists, cannot be made, or lies inside an artifact of a run, by links too."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists: nothing is overwritten; choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such directory: make it, or choose another --out")
    folder = out.parent.resolve()
    for above in (folder, *folder.parents):
        if read_manifest(above) is not None:
            raise InputError(
                f"{out}: lies inside {above}, an artifact that a run has finished: its files stay as its manifest.json "
                "says; choose an --out beside it"
            )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out`; its `out` gets the name `out` when the block ends without an error.

    Raises InputError when `out` exists or cannot be made, before the block and after it.
    """
    require_new(out)
    with writing(out):
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
    try:
        make_directory(partial / "out")
        yield partial
        require_new(out)  # somebody may have made it meanwhile
        put_in_place(partial / "out", out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None without one of ours."""
    file = path / MANIFEST
    try:
        manifest = read_json(file) if file.is_file() else {}
    except InputError:
        return None
    objects = (manifest.get("files"), manifest.get("sha256", {}), manifest.get("provenance", {}))
    known = all(isinstance(value, dict) for value in objects) and isinstance(manifest.get("key"), str)
    return manifest if known else None


def changed_files(path: Path, digests: DigestsOf = DIGESTS.of_all) -> dict[str, str]:
    """File name -> how it differs from what the manifest of `path` says; {} without a manifest.

    Manifests of older versions hold sizes alone.
    """
    manifest = read_manifest(path) or {"files": {}}
    wrong: dict[str, str] = {}
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            wrong[name] = "is missing"
        elif file.stat().st_size != size:
            wrong[name] = f"has {file.stat().st_size} bytes, {size} were written"
    named = {n: d for n, d in manifest.get("sha256", {}).items() if n in manifest["files"] and n not in wrong}
    for (name, wanted), found in zip(named.items(), digests([path / n for n in named]), strict=True):
        if found != wanted:
            wrong[name] = f"its content changed since it was written (sha256 {found[:12]}, was {str(wanted)[:12]})"
    return wrong
