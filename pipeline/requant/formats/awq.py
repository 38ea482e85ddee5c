"""AWQ checkpoints as AutoAWQ packs them for its GEMM kernels: 4 bits, read only.

qweight int32 [in, out/8]      codes packed along the outputs, eight in a word in the order of ORDER
qzeros  int32 [groups, out/8]  zero points as they are, packed alike
scales  fp16  [groups, out]    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),  g = i // group_size

Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and utils/packing_utils.py; vLLM 0.32.0, quantization/auto_awq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from requant.formats.bit_stream import WORD, fitting_groups
from requant.formats.quantized_format import PackError, Packing, SixteenBitEnds

SUFFIXES = ("qweight", "qzeros", "scales")
CODES = "qweight"
METHOD, BITS = "awq", 4
IN_A_WORD = WORD // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is at each place of a word, lowest bits first


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor for a weight [rows (out), columns (in)].

    Raises PackError when it cannot be packed.
    """
    if bits != BITS:
        raise PackError(f"AWQ has {BITS} bits, not {bits}")
    groups = columns // fitting_groups(rows, columns, group_size)
    return {
        "qweight": ((columns, rows // IN_A_WORD), torch.int32),
        "qzeros": ((groups, rows // IN_A_WORD), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of AWQ; its checks say whether it is packed for GEMM."""
    return config.get("quant_method") == METHOD


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`bits` and `group_size` of a `quantization_config`, which AutoAWQ's own files call otherwise."""
    return {"bits": config.get("bits", config.get("w_bit")), "group_size": config.get(
        "group_size", config.get("q_group_size"))}  # fmt: skip


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes, scales and zeros in the tensors of one linear.

    (codes uint8 [out, in], scale fp32 [out, groups], zero fp32 [out, groups], group of each input int64 [in]).
    """
    codes, zeros = (_unpack_columns(tensors[suffix]) for suffix in ("qweight", "qzeros"))
    columns, groups = codes.shape[0], zeros.shape[0]
    group = torch.arange(columns, device=codes.device) // (columns // groups)
    return codes.T.contiguous(), tensors["scales"].float().T.contiguous(), zeros.float().T.contiguous(), group


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 [n, m/8] -> uint8 [n, m]: the codes along a row, put in order."""
    codes = torch.empty(*words.shape, IN_A_WORD, dtype=torch.uint8, device=words.device)
    for place, output in enumerate(ORDER):
        codes[..., output] = ((words >> (BITS * place)) & (2**BITS - 1)).to(torch.uint8)
    return codes.flatten(1)


class AwqRules(SixteenBitEnds):
    """Which linears a quantization config declares as quantized: all but those of `modules_to_not_convert`.

    Such an entry is a module, by the whole or by some parts of its name. vLLM takes any part of a name for it too, by
    which `gate` would be every `gate_proj`.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.settings = settings(declared)
        self.left = tuple(f".{name.strip('.')}." for name in declared.get("modules_to_not_convert") or ())

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block.

        None: left in 16 bit.
        """
        if any(name in f".{module}." for name in self.left):
            return None
        return Packing(
            **self.settings, symmetric=False, desc_act=False, rows=linear.out_features, columns=linear.in_features
        )
