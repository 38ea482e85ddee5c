"""A run directory compared with the undisturbed run's, but for what a clock has written.

Excepted: log.txt and events.jsonl (times), seconds and memory in .stages.json and report.json, what report.md and
report.html show of these, times of files in .digests.json; of .requant.json only that it is there. `.cache` is no result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MEASURED = re.compile(r"seconds|peak|rss|time|created|cost|per_second|memory|gates|verdict|warm|share|resum")
CLOCKS = {
    "log.txt",
    "events.jsonl",
    ".digests.json",
    ".stages.json",
    "report.json",
    "report.md",
    "report.html",
    "README.md",
    "recipe.yaml",
    ".requant.json",
}
OUTPUT = re.compile(r"  dir: .*?(?=\\n)")  # output.dir in the report's copy of the recipe
LAST_BIT = 2.0**-7  # of a scale, which bfloat16 can hold
OTHERS = 0.05  # share of codes: one that falls on the other side moves what follows in its row
ROUNDED = 1e-2  # relative: what such codes change in a report
PACKED = ("gptq/", "healed/")
LEFTOVERS = re.compile(r"\.partial-|\.old$|\.tmp$")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document by its path, without what was measured."""
    if isinstance(value, dict):
        for key, below in value.items():
            if not MEASURED.search(str(key)):
                yield from leaves(below, f"{path}/{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from leaves(below, f"{path}/{index}")
    else:
        yield path, value


def digests(run: Path) -> dict[str, str]:
    """sha256 of every file that a user would take away."""
    files = (f for f in sorted(run.rglob("*")) if f.is_file() and ".cache" not in f.relative_to(run).parts)
    return {f.relative_to(run).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _report(run: Path) -> dict[str, Any]:
    """What a report says, wherever its run lies."""
    return dict(leaves(json.loads(OUTPUT.sub("", (run / "report.json").read_text()))))


def _alike(one: Any, other: Any, digits: float, moved: bool) -> bool:
    """moved: some codes differ; then counts and names may, too."""
    if isinstance(one, float) and isinstance(other, float):
        near = max(digits, ROUNDED) if moved else digits
        return one == other or math.isclose(one, other, rel_tol=near, abs_tol=near)
    return bool(one == other) or (moved and type(one) is type(other))


def _near(one: Path, other: Path) -> bool:
    """Whether two files of packed checkpoints differ as sums in another order make them; a manifest by its digests.

    Of a tensor's codes, and of its scales beyond their last bit, at most `OTHERS` differ.
    """
    if one.name == "manifest.json":
        return True
    if one.suffix != ".safetensors":
        return False
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(_near_tensors(a[n], b[n]) for n in a)


def _near_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        other = ~torch.isclose(a.double(), b.double(), rtol=LAST_BIT, atol=0)
    else:
        other = a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)
    return int(other.sum()) <= OTHERS * other.numel()


def difference(run: Path, reference: Path, *, gates: bool = True, keys: bool = True, digits: float = 0.0) -> str:
    """What a run's directory has other than the reference; "" when it is the same.

    gates: of the same recipe. keys: of the same inputs, whose digests make the keys in the manifests. digits: relative
    difference that sums may have; packed checkpoints may then differ by some codes, and numbers of the report as these
    make them.
    """
    mine, theirs = digests(run), digests(reference)
    left = [n for n in mine if any(LEFTOVERS.search(part) for part in Path(n).parts)]
    if left:
        return f"left behind: {left[0]}"
    if mine.keys() != theirs.keys():
        return f"files differ: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    other = [
        n for n in mine if mine[n] != theirs[n] and Path(n).name not in CLOCKS | (set() if keys else {"manifest.json"})
    ]
    moved = bool(digits and other)
    if moved:
        other = [n for n in other if not (n.startswith(PACKED) and _near(run / n, reference / n))]
    if other:
        return f"other bytes: {', '.join(other[:3])}"
    reports = [_report(d) for d in (run, reference)]
    other = [
        k for k in reports[0].keys() | reports[1].keys() if not _alike(*(r.get(k) for r in reports), digits, moved)
    ]
    other = [k for k in sorted(other) if gates or not k.startswith(("/headline", "/facts/recipe"))]
    return f"report differs: {other[0]} = {reports[0].get(other[0])!r:.60}" if other else ""
