"""GPTQ tensors on disk: packing and unpacking of integer codes, and the config.

qweight int32 [in*bits/32, out]      codes packed along the inputs, lowest bits first
qzeros  int32 [groups, out*bits/32]  zero points, stored minus one
scales  fp16  [groups, out]          W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),  g = g_idx[i]
g_idx   int32 [in]                   i // group_size
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from requant.checkpoint.reader import QUANTIZE_CONFIG
from requant.formats.bit_stream import WORD, check_whole, exact_scales, fitting_groups, pack_rows, unpack_rows
from requant.formats.quantized_format import PackError, Packing, weights

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
CODES = "qweight"
CONFIG_FILE = QUANTIZE_CONFIG


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor for a weight [rows (out), columns (in)], symmetric or not.

    Raises PackError when it cannot be packed.
    """
    group = fitting_groups(rows, columns, group_size)
    return {
        "qweight": ((columns * bits // WORD, rows), torch.int32),
        "qzeros": ((columns // group, rows * bits // WORD), torch.int32),
        "scales": ((columns // group, rows), torch.float16),
        "g_idx": ((columns,), torch.int32),
    }


def bits_of(qweight: Sequence[int], columns: int) -> int:
    """Bits a code has, from the shape of `qweight` [in*bits/32, out] and the number of inputs."""
    return WORD * qweight[0] // columns


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` describes this format, in version 1 or 2."""
    return config.get("quant_method") == "gptq"


def is_v2(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that zero points are stored as they are, not minus one."""
    return config.get("checkpoint_format") == "gptq_v2"


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """The four tensors of one linear, symmetric or not.

    codes: uint8 [out, in]. scale, zero: fp32 [out, groups].
    Raises PackError when a scale is not exact in float16, a code or zero point is no whole number in range, a zero
    point cannot be stored minus one, or the groups do not divide the inputs.
    """
    return pack_stream(pack_rows(codes.T, bits), scale, zero, bits, symmetric=symmetric)


def pack_stream(stream: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """`pack` of codes that are a stream of bits along the inputs already: int32 [in*bits/32, out]."""
    columns, groups = WORD * stream.shape[0] // bits, scale.shape[1]
    half = exact_scales(columns, scale, zero)
    if bool((zero == 0).any()):
        raise PackError("a zero point is 0, and they are stored minus one: compressed-tensors has it")
    check_whole("zero points, stored minus one,", zero, 1, 2**bits - 1)
    g_idx = torch.arange(columns, dtype=torch.int32, device=stream.device) // (columns // groups)
    return {
        "qweight": stream.contiguous(),
        "qzeros": pack_rows((zero - 1).to(torch.uint8), bits).T.contiguous(),
        "scales": half.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int, *, v2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes, scales and zeros in the four tensors of one linear.

    (codes uint8 [out, in], scale fp32 [out, groups], zero fp32 [out, groups], g_idx int64 [in]).
    """
    stream, scale, zero, g_idx = unpack_stream(tensors, bits, v2=v2)
    return unpack_rows(stream, bits).T.contiguous(), scale, zero, g_idx


def unpack_stream(
    tensors: Mapping[str, Tensor], bits: int, *, v2: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`unpack` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
    zero = unpack_rows(tensors["qzeros"].T.contiguous(), bits).float()
    if not v2:
        zero = (zero + 1) % 2**bits
    return tensors["qweight"], tensors["scales"].float().T.contiguous(), zero, tensors["g_idx"].long()


def dequantize(tensors: Mapping[str, Tensor], bits: int, *, v2: bool = False) -> Tensor:
    """The four tensors -> fp32 [out, in], any g_idx."""
    return weights(*unpack(tensors, bits, v2=v2))


def quantization_config(
    *, bits: int, group_size: int, symmetric: bool, damp: float, overrides: Mapping[str, Mapping[str, Any] | None],
    quantized: Sequence[str], meta: Mapping[str, Any], carried: Sequence[str] = (), towers: Sequence[str] = (),
    outside: Sequence[str] = (), blocks: str = "", ends: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tables: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The dict for `config.json: quantization_config` and `quantize_config.json`.

    overrides: full module name -> its own settings, or None when it is left in 16 bit. quantized: names of quantized
    linears, or the ends of such names. carried: modules of which everything is in 16 bit, also what engines fuse
    there. towers: such modules of a wrapper, for images or sound. outside: linears beside the blocks, in 16 bit, which
    no rule of GPTQ reaches. blocks: name of the list of blocks. ends: token embeddings and head -> their own settings,
    where they are quantized. tables: other embeddings, in 16 bit. Engines put the parts of a wrapper under names of
    their own: rules then match a module's name from the list of blocks on, and a tower by its own name.
    `dynamic` (gptqmodel, vLLM, SGLang) is written when a module has settings of its own or is left out,
    `modules_in_block_to_quantize` (transformers with optimum, vLLM) unless `quantized` is empty. A quantized head is
    said by `lm_head`, and named in both, as vLLM wants it.
    """
    heads = {name: {k: rule[k] for k in ("bits", "group_size", "sym")} for name, rule in ends.items()}
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": symmetric,
        "lm_head": bool(heads), "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
        "true_sequential": True, "damp_percent": damp, "static_groups": False, "meta": dict(meta),
    }  # fmt: skip
    start = r"(.*\.)?" if towers else ""
    rules: dict[str, dict[str, Any]] = {f"-:^(.*\\.)?{_inside(tower.rpartition('.')[2])}": {} for tower in towers}
    rules |= {f"-:^{_inside(root)}": {} for root in carried}
    rules |= {
        f"{'-:' if own is None else '+:'}^{start}{_escaped(name)}$": dict(own or {}) for name, own in overrides.items()
    }
    usual = {"bits": bits, "group_size": group_size, "sym": symmetric}
    rules |= {f"+:^{start}{_escaped(name)}$": own for name, own in heads.items() if own != usual}
    if rules:
        config["dynamic"] = rules
    if quantized:
        config["modules_in_block_to_quantize"] = [[*quantized, *heads]]
    return config


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _inside(module: str) -> str:
    """A pattern of a module and all that is inside it."""
    return _escaped(module) + r"(\.|$)"


class GptqRules:
    """Which linears a quantization config declares as quantized, and how.

    Read from `dynamic`, `modules_in_block_to_quantize` and, of the head, `lm_head`.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.declared = declared
        self.dynamic: Mapping[str, Mapping[str, Any]] = declared.get("dynamic") or {}
        inside = declared.get("modules_in_block_to_quantize")
        self.inside = None if inside is None else {name for group in inside for name in group}

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block.

        None: left in 16 bit.
        """
        if self.inside is not None and not any(f".{inner}".endswith(f".{name}") for name in self.inside):
            return None
        return self._packing(module, linear.out_features, linear.in_features)

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """Packing of the head, where `lm_head` says that it is quantized; embeddings never are."""
        if isinstance(layer, nn.Embedding) or self.declared.get("lm_head") is not True:
            return None
        rows, columns = layer.weight.shape  # type: ignore[misc]
        return self._packing(module, rows, columns)

    def _packing(self, module: str, rows: int, columns: int) -> Packing | None:
        """Packing by the first rule of `dynamic` that matches, else by the settings of all; None: left in 16 bit."""
        own: Mapping[str, Any] = {}
        for pattern, change in self.dynamic.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                if pattern.startswith("-:"):
                    return None
                own = change
                break
        values = dict(self.declared) | dict(own)
        return Packing(
            bits=values["bits"], group_size=values["group_size"], symmetric=values["sym"], desc_act=values["desc_act"],
            rows=rows, columns=columns,
        )  # fmt: skip
