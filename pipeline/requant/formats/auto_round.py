"""AutoRound's checkpoints of packed integers: GPTQ's tensors without g_idx, and the config.

qweight int32 [in*bits/32, out]      as in GPTQ
qzeros  int32 [groups, out*bits/32]  zero points: minus one where all linears are symmetric, else as they are
scales  fp16  [groups, out]          W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),  g = i // group_size

`packing_format` says which: AutoRound itself loads zero points minus one of symmetric linears alone, other engines load
no other. Source: auto-round 0.16.1, export/export_to_autoround, inference/convert_model.py and backend.py; vLLM 0.32.0,
quantization/inc. Both look for a module in `extra_config` by its name, then by its patterns in their order, wherever
they match; SGLang 0.5.23 wants a pattern to match the whole name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from requant.formats import gptq
from requant.formats.bit_stream import WORD, check_whole, exact_scales, pack_rows, unpack_rows
from requant.formats.quantized_format import Packing, weights

SUFFIXES = ("qweight", "qzeros", "scales")
CODES = "qweight"
METHOD = "auto-round"
MINUS_ONE, AS_THEY_ARE = "auto_round:auto_gptq", "auto_round"  # packing formats, by their zero points
IN_16_BIT = 16
_T = TypeVar("_T")
_PATTERN = frozenset(r"*+?^$()[]{}|\\")  # what makes a key of extra_config a pattern


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor for a weight [rows (out), columns (in)], symmetric or not.

    Raises PackError when it cannot be packed.
    """
    return _own(gptq.shapes(rows, columns, bits, group_size))


def _own(tensors: Mapping[str, _T]) -> dict[str, _T]:
    return {suffix: tensors[suffix] for suffix in SUFFIXES}


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of AutoRound; its checks say whether it holds packed integers."""
    return config.get("quant_method") == METHOD


def keeps_zero_points(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that zero points are stored as they are, not minus one."""
    return config.get("packing_format") == AS_THEY_ARE


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """The three tensors of one linear, zero points minus one; arguments and errors as of `gptq.pack`."""
    return _own(gptq.pack(codes, scale, zero, bits))


def pack_stream(stream: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """`pack` of codes that are a stream of bits along the inputs already: int32 [in*bits/32, out]."""
    return _own(gptq.pack_stream(stream, scale, zero, bits))


def pack_with_zeros(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True
) -> dict[str, Tensor]:
    """`pack` of one linear of a checkpoint with zero points, which are stored as they are."""
    return pack_stream_with_zeros(pack_rows(codes.T, bits), scale, zero, bits)


def pack_stream_with_zeros(
    stream: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True
) -> dict[str, Tensor]:
    """`pack_with_zeros` of codes that are a stream of bits along the inputs already: int32 [in*bits/32, out]."""
    half = exact_scales(WORD * stream.shape[0] // bits, scale, zero)
    check_whole("zero points", zero, 0, 2**bits - 1)
    qzeros = pack_rows(zero.to(torch.uint8), bits).T.contiguous()
    return {"qweight": stream.contiguous(), "qzeros": qzeros, "scales": half.T.contiguous()}


def unpack(
    tensors: Mapping[str, Tensor], bits: int, *, minus_one: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes, scales and zeros in the tensors of one linear. minus_one: how zero points are stored.

    (codes uint8 [out, in], scale fp32 [out, groups], zero fp32 [out, groups], group of each input int64 [in]).
    """
    stream, scale, zero, group = unpack_stream(tensors, bits, minus_one=minus_one)
    return unpack_rows(stream, bits).T.contiguous(), scale, zero, group


def unpack_stream(
    tensors: Mapping[str, Tensor], bits: int, *, minus_one: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`unpack` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
    stream, scales = tensors["qweight"], tensors["scales"]
    columns = WORD * stream.shape[0] // bits
    group = torch.arange(columns, device=stream.device) // (columns // scales.shape[0])
    return gptq.unpack_stream({**tensors, "g_idx": group}, bits, v2=not minus_one)


def dequantize(tensors: Mapping[str, Tensor], bits: int, *, minus_one: bool = True) -> Tensor:
    """The three tensors -> fp32 [out, in]."""
    return weights(*unpack(tensors, bits, minus_one=minus_one))


def quantization_config(
    *, bits: int, group_size: int, symmetric: bool, damp: float, overrides: Mapping[str, Mapping[str, Any] | None],
    quantized: Sequence[str], meta: Mapping[str, Any], carried: Sequence[str] = (), towers: Sequence[str] = (),
    outside: Sequence[str] = (), blocks: str = "", ends: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tables: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The dict for `config.json: quantization_config`; arguments as of `gptq.quantization_config`.

    Nothing outside of the list of blocks is quantized unless a rule names it, as a quantized head, so that linears
    beside the blocks need none. A module's settings are all written: vLLM takes one without `bits` for a module in 16
    bit. Names of a wrapper's modules are patterns, as engines put its parts under names of their own; a tower has names
    that end alike, so that its own pattern stands before them.
    """
    usual: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": symmetric}
    start = r"^(.*\.)?" if towers else None
    heads = {name: {key: rule[key] for key in usual} for name, rule in ends.items()}
    beside = [f"{start}{re.escape(tower.rpartition('.')[2])}" for tower in towers if any(overrides.values())]
    extra = {f"{root}(\\..*)?$": {"bits": IN_16_BIT} for root in [*beside, *(f"^{re.escape(c)}" for c in carried)]}
    own_rules = {
        name if start is None else f"{start}{re.escape(name)}$": {"bits": IN_16_BIT}
        if own is None
        else {**usual, **own}
        for name, own in {**overrides, **heads}.items()
    }
    asymmetric = not symmetric or any(own.get("sym") is False for own in own_rules.values())
    extra |= own_rules
    return {
        "quant_method": METHOD, "packing_format": AS_THEY_ARE if asymmetric else MINUS_ONE, "data_type": "int",
        **usual, **({"block_name_to_quantize": blocks} if blocks else {}),
        **({"extra_config": extra} if extra else {}),
    }  # fmt: skip


class AutoRoundRules:
    """Which linears a quantization config declares as quantized, and how.

    Read from `block_name_to_quantize` and `extra_config`.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.declared = declared
        self.extra: Mapping[str, Mapping[str, Any]] = declared.get("extra_config") or {}
        self.blocks = block_names(declared)

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block.

        None: left in 16 bit.
        """
        own = self._own(module)
        if own is None and self.blocks is not None and not module.startswith(self.blocks):
            return None
        return self._packing(own or {}, linear.out_features, linear.in_features)

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """Packing of the head, where settings of its own say that it is quantized; embeddings never are."""
        own = self._own(module)
        if own is None or isinstance(layer, nn.Embedding):
            return None
        rows, columns = layer.weight.shape  # type: ignore[misc]
        return self._packing(own, rows, columns)

    def _own(self, module: str) -> Mapping[str, Any] | None:
        """The settings of a module alone: those of its name, else of the first pattern."""
        own = self.extra.get(module)
        if own is None:
            own = next((self.extra[key] for key in self.extra if is_pattern(key) and re.search(key, module)), None)
        return own

    def _packing(self, own: Mapping[str, Any], rows: int, columns: int) -> Packing | None:
        """Packing by settings of its own and those of all; None: left in 16 bit."""
        values = {**self.declared, **own}
        if values["bits"] >= IN_16_BIT:
            return None
        return Packing(
            bits=values["bits"], group_size=values["group_size"], symmetric=values["sym"], desc_act=False, rows=rows,
            columns=columns,
        )  # fmt: skip


def is_pattern(key: str) -> bool:
    """Whether a key of `extra_config` is a regular expression, and no module's name."""
    return not _PATTERN.isdisjoint(key)


def block_names(declared: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The beginnings of names that `block_name_to_quantize` lists; None: it is not there, every block is meant.

    A list in it names each block of one list.
    """
    names = declared.get("block_name_to_quantize") or declared.get("to_quant_block_names")
    if not names:
        return None
    if isinstance(names, str):
        return tuple(name.strip() for name in names.split(","))
    return tuple(name for item in names for name in ([item] if isinstance(item, str) else item))
