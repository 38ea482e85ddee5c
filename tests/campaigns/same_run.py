"""A run directory compared with the undisturbed run's, but for what a clock has written.

Excepted: log.txt and events.jsonl (times), seconds and memory in .stages.json and report.json, what report.md and
report.html show of these, times of files in .digests.json; of .requant.json only that it is there. `.cache` is no result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from requant.formats import gptq

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
LAST_BIT = 2.0**-7  # of a value that is stored, in bfloat16 too
OTHERS = 0.05  # share of such values that may differ by more
AS_GOOD = 1.1  # between the errors of two roundings: one code that falls on the other side moves all that follow it
ROUNDED = 1e-2  # relative: what such codes change in a mean of a report
NOISE = re.compile(  # what a report says of few tokens, one linear or the end of an interval, where codes decide
    r"^/(headline|recommendation|facts/(heal|verify|quantize/modules)/)"
    r"|/documents/(gptq|healed)/|/(tails|retention)/|/edges/\d+/(?!kl/mean/value)"
)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
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


def _alike(path: str, one: Any, other: Any, digits: float, moved: bool) -> bool:
    """moved: some codes differ; then a mean may differ a little, and counts, names and noise as they will."""
    if one == other:
        return True
    if moved and (NOISE.search(path) or not isinstance(one, float)):
        return type(one) is type(other)
    near = max(digits, ROUNDED) if moved else digits
    both = isinstance(one, float) and isinstance(other, float)
    return both and math.isclose(one, other, rel_tol=near, abs_tol=near)


def _near(one: Path, other: Path, exact: Mapping[str, torch.Tensor]) -> bool:
    """Whether two files of packed checkpoints differ as sums in another order make them; a manifest by its digests.

    exact: weights by name, which both round: a linear's two roundings are alike when they err alike. Of any other
    tensor at most `OTHERS` of the values differ.
    """
    if one.name == "manifest.json":
        return True
    if one.suffix != ".safetensors":
        return False
    a, b = load_file(one), load_file(other)
    bits = int(json.loads((other.parent / "config.json").read_text())["quantization_config"]["bits"])
    packed = [n.removesuffix(".qweight") for n in b if n.endswith(".qweight")]
    plain = [n for n in b if n.rpartition(".")[0] not in packed]
    return (
        {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
        and all(_near_values(a[n], b[n]) for n in plain)
        and all(_near_roundings(n, a, b, exact[f"{n}.weight"], bits) for n in packed)
    )


def _near_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    other = ~torch.isclose(a.double(), b.double(), rtol=LAST_BIT, atol=0)
    return int(other.sum()) <= OTHERS * other.numel()


def _near_roundings(
    linear: str, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], exact: torch.Tensor, bits: int
) -> bool:
    """Whether the rounding in `a` of a linear's weights errs as much as the one in `b`."""
    errors = []
    for packed in (a, b):
        weights = gptq.dequantize({part: packed[f"{linear}.{part}"] for part in PARTS}, bits)
        errors.append((weights.double() - exact.double()).norm())
    return bool(max(errors) <= AS_GOOD * min(errors))


def difference(run: Path, reference: Path, *, gates: bool = True, keys: bool = True, digits: float = 0.0) -> str:
    """What a run's directory has other than the reference; "" when it is the same.

    gates: of the same recipe. keys: of the same inputs, whose digests make the keys in the manifests. digits: relative
    difference that sums may have; packed checkpoints may then round otherwise and as well, and numbers of the report
    differ as such roundings make them.
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
        exact = {n: t for f in (reference / "merged").glob("*.safetensors") for n, t in load_file(f).items()}
        other = [n for n in other if not (n.startswith(PACKED) and _near(run / n, reference / n, exact))]
    if other:
        return f"other bytes: {', '.join(other[:3])}"
    told, expected = _report(run), _report(reference)
    other = [k for k in told.keys() | expected.keys() if not _alike(k, told.get(k), expected.get(k), digits, moved)]
    other = [k for k in sorted(other) if gates or not k.startswith(("/headline", "/facts/recipe"))]
    return f"report differs: {other[0]} = {told.get(other[0])!r:.60}" if other else ""
