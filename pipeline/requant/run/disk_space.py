"""Disk space that runs take: refused before any work where it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from requant.errors import InputError
from requant.merge import stored_dtype
from requant.run.output_formats import stored_bytes, weight_files
from requant.run.prepared import Prepared


def check_disk(prepared: Prepared, where: Path) -> tuple[int, int]:
    """(bytes still to be written, bytes free) for the run directory `where`.

    Raises InputError when they do not fit.
    """
    return _fitting(_still_to_write(prepared, where, merged=True), where)


def check_disk_of_all(runs: Mapping[Path, Prepared]) -> tuple[int, int]:
    """`check_disk` of several runs that share merged weights. runs: run directory -> what it needs."""
    need, counted = 0, set()
    for where, prepared in runs.items():
        need += _still_to_write(prepared, where, merged=id(prepared.merge.plan) not in counted)
        counted.add(id(prepared.merge.plan))
    return _fitting(need, next(iter(runs)))


def _still_to_write(prepared: Prepared, where: Path, *, merged: bool) -> int:
    """Bytes of the checkpoints that are not on the disk yet. merged: whether it writes the merged one."""
    dtype = stored_dtype.expected_dtype(prepared.merge.plan.base.checkpoint, prepared.recipe.merge.dtype)
    others = [name for name in prepared.recipe.output.formats if name != "gptq"]
    formats = ["gptq", *(["gptq"] if prepared.heal else []), *others]
    library = "gptqmodel" in prepared.recipe.evaluate.roads
    quantized, model = prepared.quantize, sum(s.nbytes for s in prepared.merge.plan.slots(dtype))
    need = sum(stored_bytes(quantized.ends.added_to(quantized.plan, name), name) for name in formats)
    need += stored_bytes(quantized.plan, "gptq") + model if library else 0  # what it works on lies on the disk too
    need += model if merged else 0
    names = (*(["merged"] if merged else []), "gptq", "healed", *others)
    written = {f for name in names for d in where.glob(f"*{name}*") for f in weight_files(d)}
    return max(0, need - sum(f.stat().st_size for f in written))  # of this run, or replaced by it


def _fitting(need: int, where: Path) -> tuple[int, int]:
    from requant_eval.report.number_format import format_bytes

    existing = next(p for p in (where, *where.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise InputError(
            f"{existing}: {format_bytes(free)} free, the run writes {format_bytes(need)}: free space or set output.dir"
        )
    return need, free
