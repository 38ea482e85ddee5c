"""One mutated input: its files, the command that reads it, and who judges a success."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from campaigns.workshop import Workshop

STRANGE_FILES = 0.03  # share of inputs that are no plain files


@dataclass(kw_only=True)
class Case:
    """What to run, and what to think of exit code 0. label: what was changed.

    judge: called after a success; returns why it should have been none, or "".
    """

    argv: list[object]
    label: str
    judge: Callable[[], str] | None = None
    job: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What a case is made with. folder: empty, for this case alone."""

    shop: Workshop
    folder: Path
    rng: Random


Maker = Callable[[Bench], Case]


def linked(source: Path, target: Path, files: Mapping[str, bytes | None]) -> Path:
    """A directory like `source`, of links, whose `files` have other bytes; None leaves one out."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.name not in files:
            (target / item.name).symlink_to(item.resolve())
    for name, data in files.items():
        if data is not None:
            (target / name).write_bytes(data)
    return target


def make_strange(file: Path, rng: Random) -> str:
    """Put something else in a file's place: a FIFO, a directory, a link to nothing or without end."""
    kind = rng.choice(("fifo", "directory", "dangling", "loop", "zero", "socketless"))
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        targets = {"dangling": file.with_name("nowhere"), "loop": file, "zero": "/dev/zero", "socketless": "/dev/tty"}
        file.symlink_to(targets[kind])
    return kind


def perhaps_strange(bench: Bench, file: Path, label: str) -> str:
    """The label of a case, whose file is now and then no plain one."""
    if bench.rng.random() < STRANGE_FILES:
        return f"{file.name} is a {make_strange(file, bench.rng)}"
    return f"{file.name} {label}"


def merged(bench: Bench) -> Path:
    """Where the case's run writes the merged model."""
    return bench.folder / "runs" / "pico" / "merged"


def merge_with(bench: Bench, **changes: object) -> list[object]:
    """Arguments that merge with these recipe keys, `__` for a dot; now and then check or go through all stages."""
    command = bench.rng.choices(("merge", "run", "check"), (0.93, 0.04, 0.03))[0]
    return bench.shop.run_of(bench.folder / "runs", command, {k.replace("__", "."): v for k, v in changes.items()})
