"""compressed-tensors on disk (`pack-quantized`): packing and unpacking, and the config.

weight_packed     int32 [out, in*bits/32]      codes packed along the inputs, lowest bits first
weight_scale      fp16  [out, groups]          W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]),  g = i // group_size
weight_zero_point int32 [out*bits/32, groups]  zero points as they are, packed along the outputs; only if asymmetric
weight_shape      int64 [2]                    out, in

Source: compressed-tensors 0.20.1, compressors/pack_quantized. Its codes are signed, and stored with 2^(bits-1) added;
here they are as stored. It has no order of the inputs: a group is always of neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from requant.formats.bit_stream import WORD, check_whole, exact_scales, fitting_groups, pack_rows, unpack_rows
from requant.formats.quantized_format import Packing, weights

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
CODES = "weight_packed"
METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
EVERY_LINEAR, EVERY_EMBEDDING = "Linear", "Embedding"  # as targets: every module of this class
REGEX = "re:"


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor for a weight [rows (out), columns (in)].

    Zero points are there only if it is asymmetric. Raises PackError when it cannot be packed.
    """
    groups = columns // fitting_groups(None if symmetric else rows, columns, group_size)
    return {
        "weight_packed": ((rows, columns * bits // WORD), torch.int32),
        "weight_scale": ((rows, groups), torch.float16),
        **({} if symmetric else {"weight_zero_point": ((rows * bits // WORD, groups), torch.int32)}),
        "weight_shape": ((2,), torch.int64),
    }


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of compressed-tensors; its checks say whether it is packed integers."""
    return config.get("quant_method") == METHOD


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """The tensors of one linear; without zero points where it is symmetric.

    codes: uint8 [out, in]. scale, zero: fp32 [out, groups].
    Raises PackError when a scale is not exact in float16, a code or zero point is no whole number in range, a symmetric
    zero point is not 2^(bits-1), or the groups do not divide the inputs.
    """
    return pack_stream(pack_rows(codes.T, bits), scale, zero, bits, symmetric=symmetric)


def pack_stream(stream: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """`pack` of codes that are a stream of bits along the inputs already: int32 [in*bits/32, out]."""
    columns = WORD * stream.shape[0] // bits
    half = exact_scales(columns, scale, zero)
    middle = 2 ** (bits - 1)
    if symmetric:
        check_whole("symmetric zero points", zero, middle, middle)
    else:
        check_whole("zero points", zero, 0, 2**bits - 1)
    zeros = {} if symmetric else {"weight_zero_point": pack_rows(zero.to(torch.uint8), bits)}
    return {
        "weight_packed": stream.T.contiguous(),
        "weight_scale": half.contiguous(),
        **zeros,
        "weight_shape": torch.tensor([stream.shape[1], columns], device=stream.device),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes, scales and zeros in the tensors of one linear.

    (codes uint8 [out, in], scale fp32 [out, groups], zero fp32 [out, groups], group of each input int64 [in]).
    """
    stream, scale, zero, group = unpack_stream(tensors, bits)
    return unpack_rows(stream.contiguous(), bits).T.contiguous(), scale, zero, group


def unpack_stream(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`unpack` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
    stream, scale = tensors["weight_packed"].T, tensors["weight_scale"].float()
    columns, groups = WORD * stream.shape[0] // bits, scale.shape[1]
    stored = tensors.get("weight_zero_point")
    zero = torch.full_like(scale, 2 ** (bits - 1)) if stored is None else unpack_rows(stored, bits).float()
    return stream, scale, zero, torch.arange(columns, device=stream.device) // (columns // groups)


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The tensors -> fp32 [out, in]."""
    return weights(*unpack(tensors, bits))


def quantization_config(
    *, bits: int, group_size: int, symmetric: bool, damp: float, overrides: Mapping[str, Mapping[str, Any] | None],
    quantized: Sequence[str], meta: Mapping[str, Any], carried: Sequence[str] = (), towers: Sequence[str] = (),
    outside: Sequence[str] = (), blocks: str = "", ends: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tables: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The dict for `config.json: quantization_config`; arguments as of `gptq.quantization_config`.

    Modules with settings of their own are the targets of a config group of their own, by name; all others are of the
    class Linear. What is in 16 bit is in `ignore`, all linears beside the blocks too, as transformers would else take
    them for quantized. Quantized token embeddings are a group by their class, since vLLM's models often do not give
    them a name. Other keys (`damp`, `meta`) have no place in it: engines refuse what they do not know.
    """
    start = r"(.*\.)?" if towers else ""
    settings: dict[tuple[int, int, bool], list[str]] = {(bits, group_size, symmetric): [EVERY_LINEAR]}
    ignore = [f"{REGEX}^(.*\\.)?{_inside(tower.rpartition('.')[2])}" for tower in towers]
    for name, own in overrides.items():
        if own is None:
            ignore.append(f"{REGEX}^{start}{_inside(name)}")
        else:
            values = (own.get("bits", bits), own.get("group_size", group_size), own.get("sym", symmetric))
            settings.setdefault(values, []).append(f"{REGEX}^{start}{re.escape(name)}$")
    ignore += [f"{REGEX}^{_inside(root)}" for root in carried]
    tables = [name for name in tables if any(rule["embeddings"] for rule in ends.values())]
    for name, rule in ends.items():
        target = EVERY_EMBEDDING if rule["embeddings"] else f"{REGEX}^{start}{re.escape(name)}$"
        settings.setdefault((rule["bits"], rule["group_size"], rule["sym"]), []).append(target)
    outside = [name for name in outside if name not in ends]
    groups = {f"group_{i}": _group(targets, *own) for i, (own, targets) in enumerate(settings.items())}
    return {
        "quant_method": METHOD, "format": LAYOUT, "quantization_status": "compressed", "config_groups": groups,
        "ignore": [*dict.fromkeys([*outside, *tables, *ignore])],
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _group(targets: list[str], bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """One config group: these targets have these weights, and activations in 16 bit."""
    strategy: dict[str, Any] = (
        {"strategy": "channel", "group_size": None}
        if group_size == -1
        else {"strategy": "group", "group_size": group_size}
    )
    weight = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, "dynamic": False}
    return {"targets": targets, "weights": weight, "input_activations": None, "output_activations": None}


def _inside(module: str) -> str:
    """A pattern of a module and all that is inside it."""
    return re.escape(module) + r"(\.|$)"


class CompressedTensorsRules:
    """Which linears a quantization config declares as quantized, and how.

    Read from `ignore` and `config_groups`. As in vLLM and transformers, a target that is a module's name or a pattern
    of it comes before the class.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.ignore: Sequence[str] = declared.get("ignore") or ()
        self.groups: Sequence[Mapping[str, Any]] = list(declared["config_groups"].values())

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block.

        None: left in 16 bit.
        """
        return self._packing(module, EVERY_LINEAR, linear.out_features, linear.in_features)

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """Packing of the token embeddings or the head; None: in 16 bit."""
        rows, columns = layer.weight.shape  # type: ignore[misc]
        kind = EVERY_EMBEDDING if isinstance(layer, nn.Embedding) else EVERY_LINEAR
        return self._packing(module, kind, rows, columns)

    def _packing(self, module: str, kind: str, rows: int, columns: int) -> Packing | None:
        """Packing of a module of the class `kind`, None: left in 16 bit."""
        if _names(module, self.ignore) or kind in self.ignore:
            return None
        named = (group for group in self.groups if _names(module, group["targets"]))
        every = (group for group in self.groups if kind in group["targets"])
        own = next(named, None) or next(every, None)
        if own is None:
            return None
        weight = own["weights"]
        return Packing(
            bits=weight["num_bits"], group_size=weight.get("group_size") or -1, symmetric=weight["symmetric"],
            desc_act=False, rows=rows, columns=columns,
        )  # fmt: skip


def _names(module: str, targets: Iterable[str]) -> bool:
    """Whether one of the targets names a module, or is a pattern that its name begins with."""
    return any(
        re.match(target.removeprefix(REGEX), module) if target.startswith(REGEX) else target == module
        for target in targets
    )
