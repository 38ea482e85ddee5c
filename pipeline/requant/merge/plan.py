"""What a merge will do to every tensor, known from headers: which adapter tensor goes where, and that all of them do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from requant.adapters import expert_layouts
from requant.adapters.fold import Fold
from requant.adapters.keys import locate, stems
from requant.adapters.peft_directory import Adapter
from requant.adapters.trained_tokens import Rows
from requant.checkpoint.reader import TensorInfo, read_tensor
from requant.checkpoint.writer import Slot
from requant.errors import InputError
from requant.merge.base_weights import Base, Weight
from requant.modeling.stacked_experts import Fused


@dataclass(frozen=True, slots=True)
class Op:
    """How one output tensor comes about: from a base weight, replaced, then folded by one adapter or several."""

    name: str
    shape: tuple[int, ...]
    source: Weight | None
    folds: tuple[Fold, ...] = ()
    replacement: TensorInfo | None = None
    bias_of: tuple[Fold, ...] = ()
    conv1d: bool = False

    @property
    def action(self) -> str:
        if self.replacement is not None:
            return "replaced+folded" if self.folds else "replaced"
        verb = "copied" if self.source is None or self.source.kind == "stored" else "decoded"
        return f"{verb}+folded" if self.folds or self.bias_of else verb


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do, known from headers. `ops` are in the base checkpoint's order."""

    base: Base
    adapters: tuple[Adapter, ...]
    ops: tuple[Op, ...]
    untied: bool
    vocab_size: int | None
    located: Mapping[str, str]  # module name in the adapter -> in the base, where they differ
    warnings: tuple[str, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The first adapter: its tokenizer goes with the result."""
        return self.adapters[0]

    @property
    def ledger(self) -> dict[str, Any]:
        """Counts on both sides: what became of base tensors, and of adapter tensors."""
        own = {
            "consumed": sum(len(a.tensors) - a.copies for a in self.adapters),
            "folds": sum(len(a.folds) + len(a.experts) for a in self.adapters),
            "replaced": sum(len(a.replaced) for a in self.adapters),
        }
        copies = sum(a.copies for a in self.adapters)
        return {
            "base": dict(Counter(op.action for op in self.ops)) | {"dropped": len(self.base.auxiliary)},
            "adapter": own | ({"copies of the base": copies} if copies else {}),
            "untied_embeddings": self.untied,
        }

    def slots(self, dtype: torch.dtype) -> list[Slot]:
        """The output checkpoint's layout."""
        return [Slot(op.name, target_dtype(op, dtype), op.shape) for op in self.ops]


@dataclass(frozen=True)
class Structure:
    """What the plan needs of the model's structure (`skeleton.py` and `fused.py` give it)."""

    names: Mapping[str, str]  # parameter name -> checkpoint name
    conv1d: frozenset[str]  # module names
    tied: tuple[str, str] | None  # parameter names (input, output embedding)
    embedding: str  # parameter name of the input embedding
    fused: Mapping[str, Fused] = field(default_factory=dict)  # stacked expert parameter -> where it is stored
    renamed: Callable[[str], str] = str  # an older release's tensor name -> today's


@dataclass
class _Wanted:
    """What all adapters want of each checkpoint tensor, by name."""

    folds: dict[str, list[Fold]] = field(default_factory=dict)
    biases: dict[str, list[Fold]] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    located: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.folds) + len(self.biases) + len(self.replaced)

    def __contains__(self, name: str) -> bool:
        return name in self.folds or name in self.replaced


def plan(base: Base, adapters: Adapter | Sequence[Adapter], structure: Structure) -> MergePlan:
    """Match every adapter tensor to a base weight; raises InputError when any is left over or does not fit."""
    every = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    sources = {w.name: w for w in base.weights.values()}
    wanted = _Wanted()
    for adapter in every:
        _want(wanted, adapter, structure, sources)
    _refuse_combinations(every, wanted)
    conv1d = {_tensor(structure, f"{m}.weight") for m in structure.conv1d}
    untied, sources = _untie(structure, any(a.ties_weights for a in every), sources, wanted)
    lost = [n for n in (*wanted.folds, *wanted.biases, *wanted.replaced) if n not in sources]
    if lost:
        theirs, ours = (", ".join(sorted(names)[:3]) for names in (lost, sources))
        raise InputError(
            f"{_paths(every)}: {len(lost)} of {len(wanted)} adapted tensors do not exist in the base "
            f"{base.checkpoint.path}: e.g. {theirs}; the base has e.g. {ours}. Is this the adapter's base?"
        )
    ops = tuple(
        _op(every, Op(n, w.shape, w, tuple(wanted.folds.get(n, ())), wanted.replaced.get(n),
                      tuple(wanted.biases.get(n, ())), n in conv1d))
        for n, w in sources.items()
    )  # fmt: skip
    embedding = _tensor(structure, structure.embedding)
    rows = next((op.shape[0] for op in ops if op.name == embedding), None)
    resized = rows if rows is not None and rows != sources[embedding].shape[0] else None
    return MergePlan(base, every, ops, untied, resized, wanted.located, _warnings(every))


def _want(wanted: _Wanted, adapter: Adapter, structure: Structure, sources: Mapping[str, Weight]) -> None:
    """Enter one adapter's folds and replacements under the names of the checkpoint."""
    modules = {p.rpartition(".")[0] for p in (*structure.names, *sources, *structure.fused)}
    known, by_stem = modules, stems(modules)

    def place(module: str) -> str:
        found = locate(module, known, by_stem)
        if found not in known:
            found = locate(structure.renamed(f"{module}.weight").removesuffix(".weight"), known, by_stem)
        if found != module and found in known:
            wanted.located[module] = found
        return found

    for module, fold in adapter.folds.items():
        there = place(module)
        wanted.folds.setdefault(_tensor(structure, f"{there}.weight"), []).append(fold)
        bias = _tensor(structure, f"{there}.bias")
        if fold.bias == "needed" or (fold.bias == "if any" and bias in sources):
            wanted.biases.setdefault(bias, []).append(fold)
    for name, info in adapter.replaced.items():
        module, _, leaf = name.rpartition(".")
        there = _tensor(structure, f"{place(module)}.{leaf}")
        if there in wanted.replaced:
            raise InputError(f"{adapter.path}: {there} is replaced twice: which tensor counts?")
        wanted.replaced[there] = info
    for name, piece in expert_layouts.place(adapter, structure.fused, place):
        wanted.folds.setdefault(name, []).append(piece)


def _refuse_combinations(adapters: Sequence[Adapter], wanted: _Wanted) -> None:
    """Several adapters add up only if all of them are plain sums; PEFT has no meaning for the rest either."""
    if len(adapters) == 1 and adapters[0].weight == 1:
        return
    for adapter in adapters:
        config = adapter.config
        why = (
            f"is {config.get('peft_type')}" if config.get("peft_type") != "LORA"
            else "is DoRA: its norms depend on the other adapters" if config.get("use_dora")
            else f"replaces {next(iter(adapter.replaced))} of the base" if adapter.replaced
            else "has trained tokens, which replace rows of the base"
            if any(isinstance(f, Rows) for f in adapter.folds.values())
            else None
        )  # fmt: skip
        if why:
            raise InputError(f"{adapter.path}: this adapter {why}; only plain LoRA can be weighted or added to another")


_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$")


def _warnings(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Where PEFT itself is wrong, so that comparing with it will show a difference."""
    wrong = [a for a in adapters if a.config.get("use_rslora") and any(_SINGLE_EXPERT.search(m) for m in a.folds)]
    return tuple(
        f"{a.path.name}: PEFT 0.21 applies rsLoRA on fused experts sqrt(2) times too strongly: the merge does not, so it "
        "will differ from the variant adapter"
        for a in wrong
    )


def _paths(adapters: Sequence[Adapter]) -> str:
    return ", ".join(str(a.path) for a in adapters)


def _tensor(structure: Structure, parameter: str) -> str:
    return structure.names.get(parameter, parameter)


def _untie(
    structure: Structure, tie_on_purpose: bool, sources: dict[str, Weight], wanted: _Wanted
) -> tuple[bool, dict[str, Weight]]:
    """Decide about tied embeddings: once the adapter makes the two ends differ, both are written."""
    if structure.tied is None:
        return False, sources
    inner, outer = _tensor(structure, structure.tied[0]), structure.tied[1]
    stored = structure.names.get(outer)
    if stored is not None and stored != inner and stored in sources:
        sources = {n: w for n, w in sources.items() if n != stored}  # a redundant copy of a tied head
    if inner not in wanted and outer not in wanted:
        return False, sources
    folds, replaced = wanted.folds, wanted.replaced
    if _same_rows(folds.get(inner, []), folds.get(outer, [])) and inner not in replaced and outer not in replaced:
        folds.pop(outer, None)
        return False, sources
    both = inner in replaced and outer in replaced
    folded = inner in folds or outer in folds
    same = both and not folded and torch.equal(read_tensor(replaced[inner]), read_tensor(replaced[outer]))
    if same or tie_on_purpose:
        if outer in folds:
            folds.setdefault(inner, folds.pop(outer))
        if outer in replaced:
            replaced.setdefault(inner, replaced.pop(outer))
        return False, sources
    return True, sources | {outer: sources[inner]}


def _same_rows(inner: list[Fold], outer: list[Fold]) -> bool:
    """Whether only trained tokens touch a tied pair, and the same for both ends: PEFT keeps these tied."""
    if len(inner) != 1 or len(outer) > 1:
        return False
    (one,), (other,) = inner, outer or inner
    if not isinstance(one, Rows) or not isinstance(other, Rows) or one.indices != other.indices:
        return False
    return torch.equal(read_tensor(one.rows), read_tensor(other.rows))


def _op(adapters: Sequence[Adapter], op: Op) -> Op:
    """Check one output tensor's shapes; a replacement may have other rows than the base (a resized vocabulary)."""
    shape, new = op.shape, op.replacement
    if new is not None:
        if new.shape[1:] != shape[1:] or (len(shape) < 2 and new.shape != shape):
            raise InputError(
                f"{_paths(adapters)}: {op.name} has shape {new.shape}, the base's is {shape}: "
                "this adapter belongs to another base"
            )
        shape = new.shape
    oriented = shape[::-1] if op.conv1d else shape
    for fold in op.folds:
        expected = fold.shape
        if len(expected) != len(shape) or any(e not in (-1, n) for e, n in zip(expected, oriented, strict=True)):
            raise InputError(
                f"{_paths(adapters)}: LoRA of {fold.module} makes a {_shown(expected)} delta, the base's weight is "
                f"{oriented}: this adapter belongs to another base"
            )
        why = fold.misfit(oriented)
        if why:
            raise InputError(f"{_paths(adapters)}: {fold.module}: {why}")
    return replace(op, shape=shape)


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape).replace("-1", "any")


def target_dtype(op: Op, dtype: torch.dtype) -> torch.dtype:
    """Floating tensors go to `dtype`, others stay as they are."""
    value = op.replacement.dtype if op.replacement else op.source.dtype if op.source else dtype
    return dtype if value.is_floating_point else value
