"""Conversion of a quantized checkpoint into another layout.

Codes, scales and zero points stay the same. Nothing is rounded: what cannot be said in the other layout is refused. One
linear is in memory at a time. What was written is read back and compared with its source before it gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from requant import __version__
from requant.checkpoint.artifact import new_directory, require_new
from requant.checkpoint.atomic_write import copy_file
from requant.checkpoint.model_files import VOCABULARY
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter
from requant.deploy import check_headers
from requant.deploy.check_headers import HeaderCheck
from requant.deploy.conversion_plan import ConversionPlan, plan_conversion
from requant.deploy.own_scores import tokenized
from requant.errors import InputError, StageError
from requant.formats.quantized_format import Finding, PackError, QuantizedFormat, Reader
from requant.formats.registry import FORMATS
from requant.modeling import skeleton
from requant.quantize.gptq_files import write_small_files

Progress = Callable[[int, int, str], None]
CARDS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_SHOWN = 5  # findings in a message


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted. dropped: stored tensors that say nothing, and why. nbytes: of all tensors, before and after.

    plan: of what was written, for the table of engines.
    """

    linears: int
    dropped: dict[str, str]
    nbytes: tuple[int, int]
    plan: ConversionPlan


@torch.no_grad()
def convert(
    source: Path, out: Path, to: str, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Conversion:
    """Write the quantized checkpoint in `source` as a new directory `out` in the layout `to`, one of `FORMATS`.

    Raises:
        InputError: `out` is there, `source` is wrong or in this layout already, or cannot be said in it.
        StageError: what was written does not decode to the same weights.
    """
    require_new(out)
    headers = _checked(source, to, trust_remote_code=trust_remote_code)
    planned = plan_conversion(headers, FORMATS[to], source)
    steps = _Steps(2 * len(planned.plan.grids), progress)
    with new_directory(out) as partial:
        _write(planned, partial / "out", steps)
        _write_files(planned, source, partial / "out")
        _compare(planned, partial / "out", steps, trust_remote_code=trust_remote_code)
    before = sum(info.nbytes for info in headers.checkpoint.values())
    after = sum(slot.nbytes for slot in planned.plan.slots)
    return Conversion(
        linears=len(planned.plan.grids), dropped=dict(planned.dropped), nbytes=(before, after), plan=planned
    )


class _Steps:
    """Counts linears written and compared."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def one(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


def _checked(source: Path, to: str, *, trust_remote_code: bool) -> HeaderCheck:
    """The headers of a checkpoint that may be converted; InputError where its config is not to be read."""
    headers = check_headers.check_weights(source, trust_remote_code=trust_remote_code)
    if headers.layout is None or not headers.usable:
        raise InputError("\n".join([f"{source}: cannot be converted:", *map(str, headers.findings[:_SHOWN])]))
    if headers.layout.name == to:
        raise InputError(f"{source}: is a {to} checkpoint already: name another format")
    skeleton.check_generation_config(source)  # the small files are copied: what no engine loads is no checkpoint
    if any((source / name).exists() for name in VOCABULARY):
        tokenized(source, "a", trust_remote_code=trust_remote_code)
    return headers


def _write(planned: ConversionPlan, out: Path, steps: _Steps) -> None:
    """Write every tensor of the plan, one linear in memory at a time."""
    reader, target = planned.reader, planned.plan.format
    with CheckpointWriter(out, planned.plan.slots) as writer:
        for module, weight in planned.plan.weights.items():
            for suffix, tensor in _repacked(planned, module, weight, target).items():
                writer.write(f"{weight.removesuffix('weight')}{suffix}", tensor)
            steps.one(f"writing {module}")
        for name in planned.kept:
            writer.write(name, reader.checkpoint.read(name))
        writer.close()


def _repacked(planned: ConversionPlan, module: str, weight: str, target: QuantizedFormat) -> dict[str, Tensor]:
    """One linear's tensors in the target layout; InputError where they cannot say the same."""
    reader, grid = planned.reader, planned.plan.grids[module]
    tensors = reader.tensors(weight)
    path, stem = reader.checkpoint.path, weight.removesuffix(".weight")
    wrong: Iterator[Finding] = planned.source.checks.values(stem, tensors, planned.packings[module], reader)
    for finding in wrong:
        raise InputError(f"{path}: {finding}: `requant verify` shows all that is wrong")
    codes, scale, zero, group = reader.decode(tensors)
    size = codes.shape[1] // scale.shape[1]
    if not torch.equal(group, torch.arange(codes.shape[1]) // size):
        raise InputError(
            f"{path}: {stem} has its groups in an order of their own (desc_act), which {target.name} cannot say and no "
            "engine reads: quantize again without it"
        )
    try:
        return target.pack(codes, scale, zero, grid.bits, symmetric=grid.symmetric)
    except PackError as error:
        raise InputError(f"{path}: {stem} cannot be stored as {target.name}: {error}") from error


def _write_files(planned: ConversionPlan, source: Path, out: Path) -> None:
    """Write configs, tokenizer, templates and cards."""
    damp, meta = (planned.declared.get(key) for key in ("damp_percent", "meta"))  # no engine reads them
    write_small_files(
        source,
        out,
        planned.plan,
        planned.settings,
        dtype=planned.dtype,
        damp=damp if isinstance(damp, float) else 0.01,
        meta={**(meta if isinstance(meta, Mapping) else {}), "converter": [f"requant:{__version__}"]},
    )
    for pattern in CARDS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy_file(file, out / file.name)


def _compare(planned: ConversionPlan, out: Path, steps: _Steps, *, trust_remote_code: bool) -> None:
    """Raise StageError unless what was written has right headers and decodes to exactly what its source does."""
    headers = check_headers.check_weights(out, trust_remote_code=trust_remote_code)
    for finding in headers.findings:
        raise StageError(f"what was converted is wrong: {finding}")
    checkpoint = Checkpoint(out)
    reader = planned.plan.format.reader(checkpoint)
    if reader.quantized != frozenset(planned.plan.weights.values()):
        raise StageError("what was converted does not hold the linears of its source")
    for module, weight in planned.plan.weights.items():
        if not _same(reader, planned.reader, weight):
            raise StageError(f"{module}: what was converted does not decode to its source")
        steps.one(f"comparing {module}")
    for name in planned.kept:
        old, new = planned.reader.checkpoint.read(name), checkpoint.read(name)
        if old.dtype != new.dtype or not torch.equal(_bytes(old), _bytes(new)):
            raise StageError(f"{name}: what was converted is no copy of its source")


def _same(one: Reader, other: Reader, weight: str) -> bool:
    """Whether a weight has the same codes, scales, zero points and groups in both."""
    return all(torch.equal(a, b) for a, b in zip(one.unpack(weight), other.unpack(weight), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
