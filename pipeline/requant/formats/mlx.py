"""MLX's affine quantization on disk: packing and unpacking, and the config.

weight uint32 [out, in*bits/32]  codes packed along the inputs, lowest bits first
scales fp16   [out, groups]      W[o, i] = scales[o, g] * code[o, i] + biases[o, g],  g = i // group_size
biases fp16   [out, groups]      -zero * scale

The bias of a symmetric linear is exact; any other is rounded to float16 by half a unit of its last place at most.
Source: mlx 0.32.4 (mx.quantize, mx.dequantize), mlx-lm 0.32.2 (utils.py, load_model). Their config names no method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from requant.formats.bit_stream import WORD, check_whole, exact_scales, fitting_groups, pack_rows, unpack_rows
from requant.formats.quantized_format import PackError, Packing, weights

SUFFIXES = ("weight", "scales", "biases")
CODES = "weight"
CONFIG_KEYS = ("quantization", "quantization_config")  # MLX reads the first, others show the second
MODE = "affine"
GROUPS = (32, 64, 128)
ROUNDING = 2.0**-11  # largest change of a zero point by its bias's, relative
_OTHERS = ("desc_act", "sym", "quant_method")  # that a config of another layout has


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor for a weight [rows (out), columns (in)], symmetric or not.

    Raises PackError when it cannot be packed.
    """
    if group_size not in GROUPS:
        sizes = "a whole row" if group_size == -1 else group_size
        raise PackError(f"MLX has groups of {', '.join(map(str, GROUPS))} inputs, not of {sizes}")
    size = fitting_groups(None, columns, group_size)
    return {
        "weight": ((rows, columns * bits // WORD), torch.uint32),
        "scales": ((rows, columns // size), torch.float16),
        "biases": ((rows, columns // size), torch.float16),
    }


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is MLX's: bits and group size, and no method's name."""
    return "bits" in config and "group_size" in config and not any(key in config for key in _OTHERS)


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """The tensors of one linear. codes: uint8 [out, in]. scale, zero: fp32 [out, groups].

    Raises PackError when a scale is not exact in float16, a bias too large for it, a code or zero point no whole number
    in range, or the groups do not divide the inputs.
    """
    return pack_stream(pack_rows(codes.T, bits), scale, zero, bits)


def pack_stream(stream: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    """`pack` of codes that are a stream of bits along the inputs already: int32 [in*bits/32, out]."""
    half = exact_scales(WORD * stream.shape[0] // bits, scale, zero)
    check_whole("zero points", zero, 0, 2**bits - 1)
    biases = (-zero * scale).half()
    if not bool(torch.isfinite(biases).all()):
        raise PackError("a zero point times its scale is too large for float16")
    return {"weight": stream.T.contiguous().view(torch.uint32), "scales": half.contiguous(), "biases": biases}


def unpack(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes, scales and zeros in the tensors of one linear; a zero point is -bias / scale.

    (codes uint8 [out, in], scale fp32 [out, groups], zero fp32 [out, groups], group of each input int64 [in]).
    """
    stream, scale, zero, group = unpack_stream(tensors, bits)
    return unpack_rows(stream.contiguous(), bits).T.contiguous(), scale, zero, group


def unpack_stream(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`unpack` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
    stream, scale = tensors["weight"].view(torch.int32).T, tensors["scales"].float()
    columns, groups = WORD * stream.shape[0] // bits, scale.shape[1]
    group = torch.arange(columns, device=stream.device) // (columns // groups)
    return stream, scale, -tensors["biases"].float() / scale, group


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The tensors -> fp32 [out, in]."""
    return weights(*unpack(tensors, bits))


def quantization_config(
    *, bits: int, group_size: int, symmetric: bool, damp: float, overrides: Mapping[str, Mapping[str, Any] | None],
    quantized: Sequence[str], meta: Mapping[str, Any], carried: Sequence[str] = (), towers: Sequence[str] = (),
    outside: Sequence[str] = (), blocks: str = "", ends: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tables: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The dict for `config.json: quantization` and `quantization_config`; arguments as of `gptq.quantization_config`.

    A module has an entry of its name with its own settings, or false where it is in 16 bit.
    """
    usual: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": MODE}
    own = {
        name: False if rule is None else {k: rule.get(k, usual[k]) for k in usual} for name, rule in overrides.items()
    }
    own |= {name: {k: rule.get(k, usual[k]) for k in usual} for name, rule in ends.items()}
    return usual | own | dict.fromkeys([*(n for n in outside if n not in ends), *carried, *towers], False)


def settings_of(declared: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """Bits and group size of a module by a `quantization_config`; None: it is in 16 bit."""
    own = declared.get(module, True)
    return None if own is False else {**declared, **(own if isinstance(own, Mapping) else {})}


def rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of config.json under their older names, where most classes of mlx-lm 0.32 look for them.

    They do not know transformers 5's `rope_parameters`, and take a base of 10,000 then. Settings by kind of layer have
    no older name.
    """
    found = config.get("rope_parameters")
    if not isinstance(found, Mapping) or not isinstance(found.get("rope_theta"), (int, float)):
        return {}
    scaling = {key: value for key, value in found.items() if key != "rope_theta"}
    told = {"rope_theta": found["rope_theta"]}
    return told if found.get("rope_type", "default") == "default" else {**told, "rope_scaling": scaling}


class MlxRules:
    """Which linears a quantization config declares as quantized, and how: by an entry of their name, else by default.

    What it says of zero points is nothing: every bias is stored.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.declared = declared

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block.

        None: left in 16 bit.
        """
        values = settings_of(self.declared, module)
        if values is None:
            return None
        return Packing(
            bits=values["bits"], group_size=values["group_size"], symmetric=False, desc_act=False,
            rows=linear.out_features, columns=linear.in_features,
        )  # fmt: skip

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """Packing of the token embeddings or the head, which are quantized where their scales are stored."""
        values = settings_of(self.declared, module) if stored else None
        if values is None:
            return None
        rows, columns = layer.weight.shape  # type: ignore[misc]
        return Packing(
            bits=values["bits"], group_size=values["group_size"], symmetric=False, desc_act=False, rows=rows,
            columns=columns,
        )  # fmt: skip
