"""The merge plan: what becomes of every tensor, known from headers alone.

Every adapter tensor is matched to a tensor of the base; one that is left over or does not fit is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

import torch

from requant.adapters import expert_layouts
from requant.adapters.fold import Fold
from requant.adapters.keys import locate, stems
from requant.adapters.peft_directory import Adapter
from requant.adapters.some_rows import PartOfModule, SomeRows
from requant.adapters.stacked_lora import in_unsloths_order
from requant.checkpoint.reader import TensorInfo
from requant.checkpoint.writer import Slot
from requant.errors import InputError
from requant.merge import refusals
from requant.merge.base_weights import BaseWeight, BaseWeights
from requant.merge.changes import Changes, untie
from requant.merge.model_layout import ModelLayout
from requant.modeling.unplaced import Unplaced
from requant.numerics.dtypes import SIXTEEN_BIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """Computation of one output tensor: base weight, replacement, folds of adapters.

    The base weight is read or replaced, then folded by one adapter or several.
    shape: of the output. bias_folds: the folds that change this bias. conv1d: the weight is stored as [in, out].
    role: of a `parameter` of the model class, a buffer that it loads (`state`), or of a part that only servers run
    (`carried`).
    """

    name: str
    shape: tuple[int, ...]
    source: BaseWeight | None
    folds: tuple[Fold, ...] = ()
    replacement: TensorInfo | None = None
    bias_folds: tuple[Fold, ...] = ()
    conv1d: bool = False
    role: Literal["parameter", "state", "carried"] = "parameter"

    @property
    def action(self) -> str:
        """The kind of computation, as the ledger counts it."""
        if self.replacement is not None:
            return "replaced+folded" if self.folds else "replaced"
        if self.role == "carried":
            return "carried for servers"
        verb = "copied" if self.source is None or self.source.kind == "stored" else "decoded"
        return f"{verb}+folded" if self.folds or self.bias_folds else verb


class Ledger(TypedDict):
    """Number of tensors by what became of them, on both sides of a merge."""

    base: dict[str, int]
    adapter: dict[str, int]
    untied_embeddings: bool


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything a merge will do, known from headers.

    ops: in the base checkpoint's order. untied: input and output embeddings are written as two tensors.
    embedding_rows: of the merged input embedding. vocab_size: the new one, where the adapter resized it.
    renamed_modules: module in the adapter -> in the base, where the names differ.
    stored: dtype of the merged checkpoint; fp32: values before their rounding.
    """

    base: BaseWeights
    adapters: tuple[Adapter, ...]
    ops: tuple[Op, ...]
    untied: bool
    embedding_rows: int | None
    vocab_size: int | None
    renamed_modules: Mapping[str, str]
    unplaced: Unplaced = field(default_factory=Unplaced)
    warnings: tuple[str, ...] = ()
    stored: torch.dtype = torch.float32

    @property
    def adapter(self) -> Adapter:
        """The first adapter: its tokenizer is copied to the result."""
        return self.adapters[0]

    @property
    def ledger(self) -> Ledger:
        """Counts on both sides: what became of base tensors, and of adapter tensors."""
        counts = {
            "consumed": sum(len(a.tensors) - a.copies for a in self.adapters),
            "folds": sum(len(a.folds) + len(a.expert_pairs) for a in self.adapters),
            "replaced": sum(len(a.replaced) for a in self.adapters),
        }
        copies = sum(a.copies for a in self.adapters)
        buffers = len(self.unplaced.recomputed)
        return {
            "base": dict(Counter(op.action for op in self.ops))
            | {"dropped": len(self.base.auxiliary)}
            | ({"recomputed buffers dropped": buffers} if buffers else {}),
            "adapter": counts | ({"copies of the base": copies} if copies else {}),
            "untied_embeddings": self.untied,
        }

    @property
    def carried(self) -> dict[str, int]:
        """Module that only servers run -> number of its tensors."""
        return self.unplaced.counts

    @property
    def unsloth_experts(self) -> dict[TensorInfo, int]:
        """lora_B with experts in unsloth's order, which PEFT would read wrongly -> the number of experts."""
        return in_unsloths_order(fold for op in self.ops for fold in op.folds)

    def slots(self, dtype: torch.dtype) -> list[Slot]:
        """Name, dtype and shape of every tensor of the output checkpoint."""
        return [Slot(op.name, target_dtype(op, dtype), op.shape) for op in self.ops]


def plan(base: BaseWeights, adapters: Adapter | Sequence[Adapter], layout: ModelLayout) -> MergePlan:
    """The merge plan: every adapter tensor matched to a base weight.

    Raises InputError when any is left over or does not fit.
    """
    every = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    refusals.unknown_tensors(base, layout)
    sources = {w.name: w for w in base.weights.values() if w.name not in layout.unplaced.recomputed}
    changes = Changes()
    for adapter in every:
        _collect(changes, adapter, layout, sources)
    refusals.combinations(every)
    changed = (*changes.folds, *changes.bias_folds, *changes.replaced)
    refusals.changes_outside_the_model(every, changed, layout)
    refusals.shared_weights(every, changed, layout)
    conv1d = {layout.tensor(f"{m}.weight") for m in layout.conv1d}
    untied, sources = untie(layout, sources, changes, tie_on_purpose=any(a.ties_weights for a in every))
    lost = [n for n in (*changes.folds, *changes.bias_folds, *changes.replaced) if n not in sources]
    if lost:
        of_adapter, of_base = (", ".join(sorted(names)[:3]) for names in (lost, sources))
        raise InputError(
            f"{refusals.paths(every)}: {len(lost)} of {len(changes)} adapted tensors do not exist in the base "
            f"{base.checkpoint.path}: e.g. {of_adapter}; the base has e.g. {of_base}. Is this the adapter's base?"
            + refusals.recorded_bases(every)
        )
    ops = tuple(_op(every, changes, weight, name, conv1d=name in conv1d) for name, weight in sources.items())
    tables = set(layout.embedding_tensors)
    rows = sum(op.shape[0] for op in ops if op.name in tables) or None
    rows_before = sum(source.shape[0] for name, source in sources.items() if name in tables)
    return MergePlan(
        base=base,
        adapters=every,
        ops=_with_roles(ops, base, layout),
        untied=untied,
        embedding_rows=rows,
        vocab_size=rows if rows != rows_before else None,
        renamed_modules=changes.renamed_modules,
        unplaced=layout.unplaced,
        warnings=refusals.warnings(every),
    )


def _with_roles(ops: Sequence[Op], base: BaseWeights, layout: ModelLayout) -> tuple[Op, ...]:
    """The ops with the roles of those that are no parameter; unpacked ones keep the dtype of the file."""
    state, every = set(layout.unplaced.state), {*layout.unplaced.state, *layout.unplaced.carried}

    def with_role(op: Op) -> Op:
        if op.source is None or op.name not in every:
            return op
        unpacked = op.source.kind == "stored"
        source = replace(op.source, dtype=base.checkpoint[op.name].dtype) if unpacked else op.source
        return replace(op, role="state" if op.name in state else "carried", source=source)

    return tuple(map(with_role, ops))


def _stored_folds(module: str, fold: Fold, layout: ModelLayout) -> Iterator[tuple[str, Fold]]:
    """(parameter as the file holds it, its fold) of one module of the class: itself, rows of another, or in parts."""
    if (cut := layout.cuts.get(module)) is not None:
        yield f"{cut.joined}.weight", SomeRows(module=fold.module, fold=fold, rows=cut.rows, total=cut.total)
        return
    parts = layout.joins.get(module)
    total = sum(map(len, parts.values())) if parts else 0
    for part, rows in parts.items() if parts else ():
        yield part, PartOfModule(module=fold.module, fold=fold, rows=rows, total=total)
    if not parts:
        yield f"{module}.weight", fold


def _stored_replacements(
    adapter: Adapter, module: str, leaf: str, info: TensorInfo, layout: ModelLayout
) -> Iterator[tuple[str, TensorInfo]]:
    """(parameter as the file holds it, its new values) of one replaced parameter: itself, or its parts."""
    parts = layout.joins.get(module) if leaf == "weight" else None
    if not parts:
        yield f"{module}.{leaf}", info
        return
    refusals.resized_in_parts(adapter, module, info, layout)
    for part, rows in parts.items():
        yield part, info.rows(rows.start, rows.stop)


def _collect(changes: Changes, adapter: Adapter, layout: ModelLayout, sources: Mapping[str, BaseWeight]) -> None:
    """Add one adapter's folds and replacements under the names of the checkpoint."""
    modules = {p.rpartition(".")[0] for p in (*layout.names, *sources, *layout.fused)}
    modules |= layout.cuts.keys() | layout.joins.keys()
    by_stem = stems(layout.modules(sources))

    def in_base(module: str) -> str:
        found = locate(module, modules, by_stem)
        if found not in modules:
            found = locate(layout.current_name(f"{module}.weight").removesuffix(".weight"), modules, by_stem)
        if found != module and found in modules:
            changes.renamed_modules[module] = found
        return found

    for module, fold in adapter.folds.items():
        for parameter, own in _stored_folds(in_base(module), fold, layout):
            changes.folds.setdefault(layout.tensor(parameter), []).append(own)
            bias = layout.tensor(f"{parameter.rpartition('.')[0]}.bias")
            if own.bias == "needed" or (own.bias == "if any" and bias in sources):
                changes.bias_folds.setdefault(bias, []).append(own)
    for spelled, info in adapter.replaced.items():
        module, _, leaf = spelled.rpartition(".")
        for parameter, values in _stored_replacements(adapter, in_base(module), leaf, info, layout):
            name = layout.tensor(parameter)
            if name in changes.replaced:
                raise InputError(f"{adapter.path}: {name} is replaced twice: which tensor counts?")
            changes.replaced[name] = values
    for name, stacked in expert_layouts.assign(adapter, layout.fused, in_base):
        changes.folds.setdefault(name, []).append(stacked)


def _op(adapters: Sequence[Adapter], changes: Changes, source: BaseWeight, name: str, *, conv1d: bool) -> Op:
    """The computation of one output tensor, with checked shapes.

    A replacement may have other rows than the base (a resized vocabulary).
    """
    op = Op(
        name=name,
        shape=source.shape,
        source=source,
        folds=tuple(changes.folds.get(name, ())),
        replacement=changes.replaced.get(name),
        bias_folds=tuple(changes.bias_folds.get(name, ())),
        conv1d=conv1d,
    )
    shape, new = op.shape, op.replacement
    if new is not None:
        if new.shape[1:] != shape[1:] or (len(shape) < 2 and new.shape != shape):
            raise InputError(
                f"{refusals.paths(adapters)}: {name} has shape {new.shape}, the base's is {shape}: "
                f"this adapter belongs to another base{refusals.recorded_bases(adapters, '.')}"
            )
        shape = new.shape
    oriented = shape[::-1] if conv1d else shape
    for fold in op.folds:
        expected = fold.shape
        if len(expected) != len(shape) or any(e not in (-1, n) for e, n in zip(expected, oriented, strict=True)):
            raise InputError(
                f"{refusals.paths(adapters)}: LoRA of {fold.module} makes a {_shown(expected)} delta, the base's "
                f"weight is {oriented}: this adapter belongs to another base{refusals.recorded_bases(adapters, '.')}"
            )
        why = fold.why_it_does_not_fit(oriented)
        if why:
            raise InputError(f"{refusals.paths(adapters)}: {fold.module}: {why}")
    return replace(op, shape=shape)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape).replace("-1", "any")


def target_dtype(op: Op, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an output tensor in the file.

    It is `dtype` for floating tensors; others stay as they are. So do buffers that the model loads, and 16-bit tensors
    that only servers run.
    """
    if op.source is not None and (op.role == "state" or (op.role == "carried" and op.source.dtype in SIXTEEN_BIT)):
        return op.source.dtype
    value = op.replacement.dtype if op.replacement else op.source.dtype if op.source else dtype
    return dtype if value.is_floating_point else value
