"""What may be on a disk after a power loss: a record of calls, and states drawn from it.

Kept for certain: data of a file up to its last fsync; names of a directory up to its last fsync; a file's own name by
its fsync. All else may be lost. Of data the loss is drawn for each file: none, all, zeros in its place, a
prefix of the writes, or any of them. Of names it is drawn for each state: a journal (a prefix survives, in order; a sync
of any file writes the journal up to there), or no order at all (each by itself).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from campaigns.syscall_layer import GROWING, Call

Kind = Literal["make", "name", "forget", "move", "write", "cut", "sync"]
ROOT = 0
LOSSES = ("none", "all", "zeros", "prefix", "any")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A call by nodes instead of paths. A node is a file or directory, whatever its name is."""

    kind: Kind
    node: int
    place: tuple[int, str] = (ROOT, "")  # directory and name that appear or go away
    source: tuple[int, str] = (ROOT, "")  # of a move
    directory: bool = False
    offset: int = 0
    data: bytes = b""

    @property
    def is_data(self) -> bool:
        return self.kind in ("write", "cut")


class Disk:
    """Names and bytes, as events leave them."""

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], int] = {}
        self.bytes: dict[int, bytearray] = {}  # of files
        self.directories = {ROOT}

    def find(self, parts: Sequence[str]) -> int | None:
        node: int | None = ROOT
        for part in parts:
            node = None if node is None else self.names.get((node, part))
        return node

    def apply(self, event: Event, *, zeros: bool = False) -> None:
        """zeros: a write makes room and loses what was written."""
        if event.kind == "make":
            self.names[event.place] = event.node
            if event.directory:
                self.directories.add(event.node)
            else:
                self.bytes.setdefault(event.node, bytearray())
        elif event.kind == "name":
            self.names[event.place] = event.node
        elif event.kind == "forget":
            self.names.pop(event.place, None)
        elif event.kind == "move" and event.source in self.names:
            self.names[event.place] = self.names.pop(event.source)
        elif event.is_data:
            self._change(event, zeros=zeros)

    def _change(self, event: Event, *, zeros: bool) -> None:
        data = self.bytes.setdefault(event.node, bytearray())
        if event.kind == "cut":
            del data[event.offset :]
        end = event.offset + len(event.data)
        data.extend(bytes(max(0, end - len(data))))
        data[event.offset : end] = bytes(len(event.data)) if zeros else event.data

    def files(self, node: int = ROOT, path: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Path and bytes of everything, None for a directory."""
        for (directory, name), below in sorted(self.names.items()):
            if directory == node:
                if below in self.directories:
                    yield f"{path}{name}", None
                    yield from self.files(below, f"{path}{name}/")
                else:
                    yield f"{path}{name}", bytes(self.bytes.get(below, b""))

    def write(self, target: Path) -> None:
        """Make real files of it."""
        target.mkdir(parents=True, exist_ok=True)
        for path, data in self.files():
            if data is None:
                (target / path).mkdir()
            else:
                (target / path).write_bytes(data)


class Record:
    """All calls of one command below `root`, an empty directory at its start; `see` is a layer's `decide`."""

    def __init__(self, root: Path) -> None:
        self.root, self.events, self.now, self.last = root, list[Event](), Disk(), ROOT

    def see(self, call: Call) -> int:
        for event in self._events(call):
            self.events.append(event)
            self.now.apply(event)
        return 0

    def _parts(self, path: str) -> list[str]:
        return [p for p in os.path.relpath(path, self.root).split("/") if p != "."]

    def _place(self, path: str) -> tuple[int, str] | None:
        *above, name = self._parts(path) or [""]
        directory = self.now.find(above)
        return None if directory is None or not name or ".." in above else (directory, name)

    def _new(self) -> int:
        self.last += 1
        return self.last

    def _events(self, call: Call) -> Iterator[Event]:
        """A call as it will succeed: one that must fail, as mkdir of what exists, changes nothing."""
        node, place = self.now.find(self._parts(call.path)), self._place(call.path)
        if call.name in ("fsync", "fdatasync"):
            if node is not None:
                yield Event(kind="sync", node=node)
        elif call.name in GROWING:
            if node is not None:
                yield from self._grown(call, node)
        elif place is None:
            return
        elif call.name in ("open", "openat", "creat"):
            if node is None and (call.offset & os.O_CREAT or call.name == "creat"):
                yield Event(kind="make", node=self._new(), place=place)
            elif node is not None and call.size:
                yield Event(kind="cut", node=node)
        elif call.name.startswith("mkdir"):
            if node is None:
                yield Event(kind="make", node=self._new(), place=place, directory=True)
        elif call.name.startswith(("unlink", "rmdir")):
            if node is not None:
                yield Event(kind="forget", node=node, place=place)
        else:
            yield from self._renamed(call, place)

    def _grown(self, call: Call, node: int) -> Iterator[Event]:
        if call.data:
            yield Event(kind="write", node=node, offset=call.offset, data=call.data)
        elif "truncate" in call.name:
            yield Event(kind="cut", node=node, offset=call.size)
        elif call.name == "fallocate" and (more := call.size - len(self.now.bytes[node])) > 0:
            yield Event(kind="write", node=node, offset=len(self.now.bytes[node]), data=bytes(more))

    def _renamed(self, call: Call, place: tuple[int, str]) -> Iterator[Event]:
        node, source = self.now.find(self._parts(call.other)), self._place(call.other)
        if node is None or source is None:
            return
        if call.name.startswith("rename"):
            yield Event(kind="move", node=node, place=place, source=source)
        elif call.name.startswith("link") and place not in self.now.names:
            yield Event(kind="name", node=node, place=place)


def state_after(events: Sequence[Event], rng: Random) -> tuple[Disk, str]:
    """What a power loss after these events may leave, and how it was drawn."""
    journal = rng.random() < 0.5
    kept = _kept_names(events, journal=journal)
    cut = rng.randrange(len(events) + 1)
    losses: dict[int, str] = {}
    disk = Disk()
    for number, event in enumerate(events):
        if event.kind == "sync":
            continue
        synced = (
            any(e.kind == "sync" and e.node == event.node for e in events[number + 1 :])
            if event.is_data
            else kept[number]
        )
        if event.is_data:
            loss = losses.setdefault(event.node, rng.choice(LOSSES))
            survives = (
                loss in ("none", "zeros")
                or (loss == "prefix" and number < cut)
                or (loss == "any" and rng.random() < 0.5)
            )
            if synced or survives:
                disk.apply(event, zeros=not synced and loss == "zeros")
        elif synced or (number < cut if journal else rng.random() < (0.9 if event.kind == "make" else 0.5)):
            disk.apply(event)
    return disk, f"{'journal' if journal else 'no order'}, {len(events)} calls"


def _kept_names(events: Sequence[Event], *, journal: bool) -> list[bool]:
    """For each event on a name whether a later sync keeps it: of its directory, of the new file; any, with a journal."""
    kept, synced, any_sync = [False] * len(events), set[int](), False
    for number in range(len(events) - 1, -1, -1):
        event = events[number]
        if event.kind == "sync":
            synced.add(event.node)
            any_sync = True
        elif not event.is_data:
            kept[number] = (
                event.place[0] in synced or (event.kind == "make" and event.node in synced) or (journal and any_sync)
            )
    return kept
