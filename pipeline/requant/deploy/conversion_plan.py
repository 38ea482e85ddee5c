"""Plan of a conversion, from headers only: linears, their settings, their new tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant.checkpoint import model_files
from requant.checkpoint.writer import Slot
from requant.deploy.check_headers import UNQUANTIZED, HeaderCheck
from requant.errors import InputError
from requant.formats.quantized_format import Packing, QuantizedFormat, Reader, StoredFormat
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits, TokenEnds
from requant.numerics.finite import all_finite
from requant.numerics.grid import Grid
from requant.quantize.plan import Layout, Plan, Settings, plan

AS_THEY_ARE = EndBits()
MEND = " (`requant verify` shows all; download it again, or write it again)"
_SHOWN = 5  # findings in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSettings(Settings):
    """The settings that a checkpoint was quantized with. grids: module -> its own; others are in 16 bit."""

    grids: Mapping[str, Grid] = field(default_factory=dict)

    def grid_of(self, module: str) -> Grid | None:
        """The grid of one module by its full name, None: 16 bit."""
        return self.grids.get(module)


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What is converted, and into which tensors.

    model: skeleton on the meta device. reader, source, declared: of the checkpoint that is read. packings: module ->
    how it is packed there. plan, settings, dtype: of the one that is written. kept: names of the tensors that are
    not quantized there. dropped: name -> why.
    """

    model: nn.Module
    reader: Reader
    source: StoredFormat
    declared: Mapping[str, Any]
    packings: Mapping[str, Packing]
    plan: Plan
    settings: Settings
    dtype: torch.dtype
    kept: tuple[str, ...]
    dropped: Mapping[str, str]

    @property
    def written(self) -> dict[str, str]:
        """Module -> name of its weight, of everything that is quantized in what is written."""
        return {**self.plan.weights, **self.plan.end_weights}

    @property
    def copied(self) -> list[str]:
        """The tensors of `kept` that are not quantized on the way."""
        quantized = set(self.plan.end_weights.values())
        return [name for name in self.kept if name not in quantized]

    @property
    def rounded(self) -> dict[str, Grid]:
        """The grids of token embeddings and head that are in 16 bit in the source."""
        stored = self.reader.quantized
        return {m: grid for m, grid in self.plan.ends.items() if self.plan.end_weights[m] not in stored}

    def unquantized(self, name: str) -> Tensor:
        """A tensor of the source that is not quantized; InputError where a value of it is not finite."""
        checkpoint = self.reader.checkpoint
        found = checkpoint.read(name)
        if found.dtype in UNQUANTIZED and not all_finite(found):
            raise InputError(f"{checkpoint.path}: {name} has values that are not finite: write the checkpoint again")
        return found

    def grid_of(self, module: str) -> Grid:
        """The grid of a quantized module."""
        return self.plan.grids.get(module) or self.plan.ends[module]


def plan_conversion(
    headers: HeaderCheck, target: QuantizedFormat, where: Path, asked: EndBits = AS_THEY_ARE
) -> ConversionPlan:
    """Plan the conversion of a checkpoint whose config was read. Raises InputError where it is wrong.

    asked: bits of token embeddings and head that are in 16 bit.
    """
    assert headers.layout is not None
    reader, checkpoint = headers.layout.reader(headers.checkpoint), headers.checkpoint
    dropped = _without_meaning(headers)
    wrong = [f"  {finding}" for finding in headers.findings if finding.where not in dropped]
    if wrong:
        raise InputError("\n".join([f"{where}: wrong in {len(wrong)} places{MEND}:", *wrong[:_SHOWN]]))
    if beyond := sorted(n for n in reader.quantized if n.removesuffix(".weight") not in headers.packed):
        name = type(headers.model).__name__
        raise InputError(f"{where}: {beyond[0]} is quantized, and {name} has no place for it: it cannot be converted")
    kept = tuple(n for n in reader if n not in reader.quantized and n not in dropped)
    dtype = _dtype(headers)
    tensors: dict[str, Layout] = {n: checkpoint[n] for n in kept}
    for stem, packing in headers.packed.items():
        shape = (packing.rows, packing.columns)
        tensors[f"{stem}.weight"] = Slot(f"{stem}.weight", dtype, shape[::-1] if stem in headers.transposed else shape)
    tensors = {name: tensors[name] for name in reader if name in tensors}
    packings = _packings(headers, reader, tensors)
    settings = _settings(headers, packings, target, where, asked)
    grids = settings.grids
    planned = plan(tensors, headers.model, settings, dtype, where=where)
    if left := sorted(grids.keys() - planned.grids.keys()):
        raise InputError(f"{where}: {left[0]} is quantized, and what engines read holds it in 16 bit")
    copied = set(kept) - set(planned.end_weights.values())
    slots = tuple(replace(s, dtype=checkpoint[s.name].dtype) if s.name in copied else s for s in planned.slots)
    return ConversionPlan(
        model=headers.model,
        reader=reader,
        source=headers.layout,
        declared=headers.declared,
        packings=packings,
        plan=replace(planned, slots=slots),
        settings=settings,
        dtype=dtype,
        kept=kept,
        dropped=dropped,
    )


def _settings(
    headers: HeaderCheck, packings: Mapping[str, Packing], target: QuantizedFormat, where: Path, asked: EndBits
) -> StoredSettings:
    """The grids of what is quantized, or will be. Raises InputError for what `target` does not hold."""
    every = {m: Grid(p.bits, p.group_size, symmetric=p.symmetric) for m, p in packings.items()}
    ends = TokenEnds.of(headers.model)
    grids = {m: grid for m, grid in every.items() if m not in ends.matrices}
    if not grids:
        raise InputError(f"{where}: holds no quantized linear: nothing to convert")
    (usual, _), *_ = Counter(grids.values()).most_common(1)
    stored, wanted = {m: every[m] for m in ends.matrices if m in every}, ends.grids(asked, usual.group_size)
    if twice := [m for m in wanted if m in stored and stored[m].bits != wanted[m].bits]:
        raise InputError(f"{where}: {twice[0]} has {stored[twice[0]].bits} bits already: it is not quantized again")
    quantized = wanted | stored
    if quantized and (why := target.why_no_ends(tied=ends.tied, embeddings=ends.embeddings in quantized)):
        raise InputError(f"{where}: {target.name} {why}")
    return StoredSettings(grid=usual, grids=grids, format=target.name, ends=quantized)


def _packings(headers: HeaderCheck, reader: Reader, tensors: Mapping[str, Layout]) -> dict[str, Packing]:
    """Module of the model -> its packing, of everything that is quantized; symmetric where its zero points are."""
    names = skeleton.tensor_names(headers.model, tensors)
    return {
        parameter.removesuffix(".weight"): replace(own, symmetric=reader.is_symmetric(stored, declared=own.symmetric))
        for parameter, stored in names.items()
        if (own := headers.packed.get(stored.removesuffix(".weight"))) is not None
    }


def _without_meaning(headers: HeaderCheck) -> dict[str, str]:
    """Stored tensors that no loader has a use for -> why: buffers that are computed, biases that are zero.

    AutoGPTQ wrote both beside the weights of models that have no such tensors.
    """
    dropped = dict.fromkeys(headers.unplaced.recomputed, "every loader computes it")
    dropped |= dict.fromkeys(_stored_twice(headers), "the embedding's values again, which loaders tie")
    for name in headers.unplaced.unknown:
        stem, _, leaf = name.rpartition(".")
        if leaf == "bias" and stem in headers.packed and not bool(headers.checkpoint.read(name).any()):
            dropped[name] = "a bias of zeros, of a linear that has none"
    return dropped


def _stored_twice(headers: HeaderCheck) -> list[str]:
    """The weight of a tied head, where it is stored too and equal to the embedding."""
    names, tied = skeleton.tensor_names(headers.model, headers.checkpoint), skeleton.tied_pair(headers.model)
    embedding, head = (names.get(parameter) for parameter in tied or ("", ""))
    if None in (embedding, head) or embedding == head or not {embedding, head} <= headers.checkpoint.keys():
        return []
    one, other = (headers.checkpoint.read(str(name)) for name in (embedding, head))
    return [str(head)] if one.dtype == other.dtype and torch.equal(one, other) else []


def _dtype(headers: HeaderCheck) -> torch.dtype:
    """The dtype that config.json declares, else that of most unquantized tensors."""
    declared = getattr(torch, str(model_files.stored_dtype(headers.checkpoint.config)), None)
    if declared in UNQUANTIZED:
        return declared  # type: ignore[no-any-return]
    packed = set(headers.packed_names)
    sizes: Counter[torch.dtype] = Counter()
    for name, info in headers.checkpoint.items():
        if name not in packed and info.dtype in UNQUANTIZED:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float16
