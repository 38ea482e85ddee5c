"""Stage: fold the adapter into the stream of base weights, account for every tensor, write a 16-bit checkpoint.

    W = D + scaling * B @ A     all in fp32, one rounding, at the end

Planned and checked from headers; then one tensor is alive at a time, written straight to its place.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from requant import artifacts
from requant.adapter import Adapter, Fold
from requant.checkpoint import TensorInfo, read_tensor
from requant.dequantize import Base, Weight
from requant.errors import InputError, StageError
from requant.writer import CheckpointWriter, Slot

log = logging.getLogger(__name__)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Op:
    """How one output tensor comes about: from a base weight, folded or replaced."""

    name: str
    shape: tuple[int, ...]
    source: Weight | None
    fold: Fold | None = None
    replacement: TensorInfo | None = None
    bias_of: Fold | None = None
    conv1d: bool = False

    @property
    def action(self) -> str:
        if self.replacement is not None:
            return "replaced+folded" if self.fold else "replaced"
        verb = "copied" if self.source is None or self.source.kind == "stored" else "decoded"
        return f"{verb}+folded" if self.fold or self.bias_of else verb


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do, known from headers. `ops` are in the base checkpoint's order."""

    base: Base
    adapter: Adapter
    ops: tuple[Op, ...]
    untied: bool
    vocab_size: int | None
    warnings: tuple[str, ...]

    @property
    def ledger(self) -> dict[str, Any]:
        """Counts on both sides: what became of base tensors, and of adapter tensors."""
        return {
            "base": dict(Counter(op.action for op in self.ops)) | {"dropped": len(self.base.auxiliary)},
            "adapter": {
                "consumed": len(self.adapter.tensors),
                "folds": len(self.adapter.folds),
                "replaced": len(self.adapter.replaced),
            },
            "untied_embeddings": self.untied,
        }

    def slots(self, dtype: torch.dtype) -> list[Slot]:
        """The output checkpoint's layout."""
        return [Slot(op.name, _target(op, dtype), op.shape) for op in self.ops]


@dataclass
class MergeResult:
    """What was done, for the report."""

    dtype: str
    why: str
    ledger: dict[str, Any]
    untrained: list[str] = field(default_factory=list)
    max_abs: float = 0.0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Structure:
    """What the plan needs of the model's structure (`skeleton.py` gives it)."""

    names: Mapping[str, str]  # parameter name -> checkpoint name
    conv1d: frozenset[str]  # module names
    tied: tuple[str, str] | None  # parameter names (input, output embedding)
    embedding: str  # parameter name of the input embedding


def plan(base: Base, adapter: Adapter, structure: Structure) -> MergePlan:
    """Match every adapter tensor to a base weight; raises InputError when any is left over or does not fit."""
    pending_folds = {_tensor(structure, f"{m}.weight"): f for m, f in adapter.folds.items()}
    biases = {_tensor(structure, f"{m}.bias"): f for m, f in adapter.folds.items() if f.bias}
    replaced = {_tensor(structure, n): t for n, t in adapter.replaced.items()}
    conv1d = {_tensor(structure, f"{m}.weight") for m in structure.conv1d}
    sources = {w.name: w for w in base.weights.values()}
    untied, sources = _untie(structure, adapter, sources, pending_folds, replaced)
    lost = [n for n in (*pending_folds, *biases, *replaced) if n not in sources]
    if lost:
        count = len(pending_folds) + len(biases) + len(replaced)
        theirs, ours = (", ".join(sorted(names)[:3]) for names in (lost, sources))
        raise InputError(
            f"{adapter.path}: {len(lost)} of {count} adapted tensors do not exist in the base {base.checkpoint.path}: "
            f"e.g. {theirs}; the base has e.g. {ours}. Is this the adapter's base?"
        )
    ops = tuple(
        _op(adapter, Op(n, w.shape, w, pending_folds.get(n), replaced.get(n), biases.get(n), n in conv1d))
        for n, w in sources.items()
    )
    embedding = _tensor(structure, structure.embedding)
    rows = next((op.shape[0] for op in ops if op.name == embedding), None)
    resized = rows if rows is not None and rows != sources[embedding].shape[0] else None
    return MergePlan(base, adapter, ops, untied, resized, ())


def _tensor(structure: Structure, parameter: str) -> str:
    return structure.names.get(parameter, parameter)


def _untie(
    structure: Structure,
    adapter: Adapter,
    sources: dict[str, Weight],
    folds: dict[str, Fold],
    replaced: dict[str, TensorInfo],
) -> tuple[bool, dict[str, Weight]]:
    """Decide about tied embeddings: once the adapter makes the two ends differ, both are written."""
    if structure.tied is None:
        return False, sources
    inner, outer = _tensor(structure, structure.tied[0]), structure.tied[1]
    if outer in structure.names and structure.names[outer] != inner and structure.names[outer] in sources:
        sources = {n: w for n, w in sources.items() if n != structure.names[outer]}  # a redundant copy of a tied head
    touched = [n for n in (inner, outer) if n in folds or n in replaced]
    if not touched:
        return False, sources
    folded = inner in folds or outer in folds
    both = inner in replaced and outer in replaced
    same = both and not folded and torch.equal(read_tensor(replaced[inner]), read_tensor(replaced[outer]))
    if same or adapter.ties_weights:
        if outer in folds:
            folds.setdefault(inner, folds.pop(outer))
        if outer in replaced:
            replaced.setdefault(inner, replaced.pop(outer))
        return False, sources
    return True, sources | {outer: sources[inner]}


def _op(adapter: Adapter, op: Op) -> Op:
    """Check one output tensor's shapes; a replacement may have other rows than the base (a resized vocabulary)."""
    shape, new, fold = op.shape, op.replacement, op.fold
    if new is not None:
        if new.shape[1:] != shape[1:] or (len(shape) < 2 and new.shape != shape):
            raise InputError(
                f"{adapter.path}: {op.name} has shape {new.shape}, the base's is {shape}: "
                "this adapter belongs to another base"
            )
        shape = new.shape
    if fold is not None:
        expected = fold.shape[::-1] if op.conv1d else fold.shape
        if shape != expected:
            raise InputError(
                f"{adapter.path}: LoRA of {fold.module} makes a {expected} delta, the base's weight is {shape}: "
                "this adapter belongs to another base"
            )
    return replace(op, shape=shape)


def _target(op: Op, dtype: torch.dtype) -> torch.dtype:
    """Floating tensors go to `dtype`, others stay as they are."""
    value = op.replacement.dtype if op.replacement else op.source.dtype if op.source else dtype
    return dtype if value.is_floating_point else value


def compute(plan: MergePlan, op: Op) -> tuple[Tensor, bool]:
    """The value of one output tensor before rounding, and whether the adapter meant to change it (False: a zero delta)."""
    assert op.source is not None
    value = read_tensor(op.replacement) if op.replacement else plan.base.read(op.source.name)
    if op.fold is not None:
        value = value.float()
        oriented = value.T.contiguous() if op.conv1d else value
        changes = op.fold.apply(oriented)
        return (oriented.T if op.conv1d else oriented), changes
    if op.bias_of is not None and op.bias_of.bias is not None:
        return value.float() + op.bias_of.scaling * read_tensor(op.bias_of.bias).float(), True
    return value, True


def choose_dtype(plan: MergePlan, asked: str) -> tuple[str, str]:
    """Resolve `auto`: float16 (8 times finer than bfloat16) unless a weight may exceed its range; returns (dtype, why)."""
    if asked != "auto":
        return asked, "asked for in the recipe"
    largest = max((_bound(plan, op), op.name) for op in plan.ops)
    if largest[0] < torch.finfo(torch.float16).max:
        return "float16", f"8 times finer than bfloat16; no weight can exceed {largest[0]:.4g} of 65504"
    return "bfloat16", f"{largest[1]} may reach {largest[0]:.4g}, above float16's 65504"


def _bound(plan: MergePlan, op: Op) -> float:
    """An upper bound of max|w| without decoding: scales bound packed weights, norms bound a delta."""
    assert op.source is not None
    if op.replacement is not None:
        bound = float(read_tensor(op.replacement).abs().max())
    elif op.source.kind == "packed":
        bound = float(plan.base.absmax(op.source).abs().max())
    else:
        bound = float(plan.base.checkpoint.read(op.source.name).abs().max())
    if op.fold is not None:
        bound = op.fold.bound() if op.fold.magnitude else bound + op.fold.bound()
    return bound


def merge(
    plan: MergePlan, out: Path, *, dtype: Literal["auto", "float16", "bfloat16", "float32"], max_shard: int = 5 * 10**9,
    progress: Progress | None = None,
) -> MergeResult:  # fmt: skip
    """Write the merged checkpoint into the existing directory `out`.

    Raises StageError naming the tensor for NaN/inf in the base or adapter, overflow of `dtype`, or a full disk.
    """
    chosen, why = choose_dtype(plan, dtype)
    target = DTYPES[chosen]
    result = MergeResult(chosen, why, plan.ledger, warnings=list(plan.warnings))
    total = len(plan.ops)
    with CheckpointWriter(out, plan.slots(target), max_bytes=max_shard) as writer, ThreadPoolExecutor(1) as disk:
        writing: Future[None] | None = None
        for done, op in enumerate(plan.ops):
            value, changes = compute(plan, op)
            if not changes and op.fold:
                result.untrained.append(op.fold.module)
            rounded = _round(op, value, _target(op, target), result)
            if writing is not None:
                writing.result()  # one tensor is written while the next is made, never more
            writing = disk.submit(writer.write, op.name, rounded)
            if progress:
                progress(done + 1, total)
        if writing is not None:
            writing.result()
        writer.close()
        result.bytes = writer.total_size
    if result.untrained and len(result.untrained) == len(plan.adapter.folds) and not plan.adapter.replaced:
        raise StageError(f"{plan.adapter.path}: every LoRA delta is exactly zero: this adapter was never trained")
    _write_small_files(plan, out, chosen)
    return result


def _round(op: Op, value: Tensor, dtype: torch.dtype, result: MergeResult) -> Tensor:
    """The one rounding; raises StageError unless every value is finite afterwards."""
    rounded = value.to(dtype)
    if not dtype.is_floating_point:
        return rounded
    low, high = (float(v) for v in torch.aminmax(rounded))
    largest = max(abs(low), abs(high))
    if not largest < float("inf"):  # also NaN
        low, high = (float(v) for v in torch.aminmax(value.float()))
        if low > -float("inf") and high < float("inf"):
            raise StageError(
                f"{op.name}: {max(abs(low), abs(high)):.4g} overflows {str(dtype).removeprefix('torch.')}: "
                "set merge.dtype to bfloat16 or auto"
            )
        raise StageError(
            f"{op.name}: NaN or infinity in the {'adapter or base' if op.fold or op.replacement else 'base'} weights"
        )
    result.max_abs = max(result.max_abs, largest)
    return rounded


def _write_small_files(plan: MergePlan, out: Path, dtype: str) -> None:
    source = plan.base.checkpoint
    config = artifacts.edit_config(source.config, dtype=dtype, untie=plan.untied, vocab_size=plan.vocab_size)
    artifacts.write_json(out / "config.json", config)
    artifacts.copy_small_files(source.path, out, adapter=plan.adapter.path)
