"""bitsandbytes 4-bit weights (NF4, FP4): decode and encode, without bitsandbytes.

Layout and semantics: Dettmers et al., QLoRA (arXiv:2305.14314), section 3, as stored by bitsandbytes:

    absmax[i] = nested_map[absmax_u8[i]] * nested_absmax[i // 256] + nested_offset     (double quantization)
    code[2j], code[2j+1] = byte[j] >> 4, byte[j] & 15
    w.flat[e] = table[code[e]] * absmax[e // blocksize]                                e over row-major [out, in]

All of it in fp32. Blocks run over the flattened matrix and cross rows when `in % blocksize != 0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from requant_eval.strict_json import parse

QuantType = Literal["nf4", "fp4"]
NESTED_BLOCK = 256
NESTED_TABLE = 256  # values that a byte of nested scales stands for
_LARGEST_BLOCK = 2**20  # bitsandbytes has blocks of 32 to 4096
STATE_DTYPES = ("float16", "bfloat16", "float32")
_CHUNK = 2**20  # bytes decoded at a time: the pairs of one chunk stay in cache for the multiplication

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
)  # fmt: skip
_FP4_HALF = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = torch.tensor(_FP4_HALF + [-v for v in _FP4_HALF])  # in bit-pattern order, not sorted
_FP4_BY_SIZE = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])
# Between the magnitudes of FP4 as bitsandbytes' CUDA kernel has them, not all of them the exact middles.
_FP4_EDGES = torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])


class Nf4Error(ValueError):
    """The bytes do not follow the layout; the message says what was found and what was expected."""


def table(quant_type: QuantType) -> Tensor:
    """The 16 fp32 values of a 4-bit type, indexed by code."""
    return NF4 if quant_type == "nf4" else FP4


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantState:
    """How the bytes of one weight are decoded: bitsandbytes' quant_state.

    Stored as `M.weight.quant_state.bitsandbytes__*`. dtype: of the weight that was quantized.
    """

    quant_type: QuantType
    blocksize: int
    shape: tuple[int, ...]
    dtype: str
    nested_offset: float | None = None
    nested_blocksize: int = NESTED_BLOCK

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of first-level scales."""
        return -(-self.numel // self.blocksize)


def parse_state(data: bytes) -> QuantState:
    """Read the quant_state JSON; raises Nf4Error for anything missing, mistyped or unknown."""
    try:
        raw: dict[str, Any] = parse(data)
        quant_type, blocksize = raw["quant_type"], _whole(raw["blocksize"])
        shape, dtype = tuple(_whole(n) for n in raw["shape"]), str(raw["dtype"])
        offset = float(raw["nested_offset"]) if "nested_blocksize" in raw else None
        nested_blocksize = _whole(raw.get("nested_blocksize", NESTED_BLOCK))
    except KeyError as error:
        raise Nf4Error(f"quant_state has no {error.args[0]!r}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise Nf4Error(f"quant_state is not the expected JSON ({error})") from error
    if quant_type not in ("nf4", "fp4"):
        raise Nf4Error(f"quant_type is {quant_type!r:.80}, expected 'nf4' or 'fp4'")
    if dtype not in STATE_DTYPES:
        raise Nf4Error(f"dtype is {dtype!r:.80}, expected one of {', '.join(STATE_DTYPES)}")
    if not 2 <= blocksize <= _LARGEST_BLOCK or blocksize % 2 or not 1 <= nested_blocksize <= _LARGEST_BLOCK:
        raise Nf4Error(f"impossible blocksize {blocksize} or nested_blocksize {nested_blocksize}")
    if not shape or min(shape) < 1 or math.prod(shape) >= 2**63:
        raise Nf4Error(f"impossible shape {shape!s:.80}")
    if offset is not None and not math.isfinite(offset):
        raise Nf4Error(f"nested_offset is {offset}")
    return QuantState(
        quant_type=quant_type,
        blocksize=blocksize,
        shape=shape,
        dtype=dtype,
        nested_offset=offset,
        nested_blocksize=nested_blocksize,
    )


def _whole(value: object) -> int:
    """A whole number as it is; raises TypeError for anything that only converts to one."""
    if type(value) is not int:
        raise TypeError(f"{value!r:.80} is not a whole number")
    return value


def check_table(stored: Tensor, quant_type: QuantType) -> None:
    """Check that the stored `quant_map` is the known table; kernels use a built-in one.

    Raises Nf4Error when it is not.
    """
    if stored.shape != (16,) or not torch.allclose(stored.float(), table(quant_type), rtol=0, atol=1e-6):
        raise Nf4Error(f"quant_map is not the {quant_type} table: {stored.flatten()[:16].tolist()}")


def unnest(absmax_u8: Tensor, nested_map: Tensor, nested_absmax: Tensor, state: QuantState) -> Tensor:
    """Second level of double quantization: uint8 [blocks] -> fp32 [blocks]."""
    if state.nested_offset is None:
        raise Nf4Error("absmax is uint8 but quant_state has no nested_offset")
    blocks = -(-absmax_u8.numel() // state.nested_blocksize)
    if nested_map.shape != (NESTED_TABLE,) or nested_absmax.shape != (blocks,):
        raise Nf4Error(
            f"nested scales {list(nested_absmax.shape)} and a map {list(nested_map.shape)}, "
            f"expected [{blocks}] and [{NESTED_TABLE}]"
        )
    values = nested_map.float()[absmax_u8.long()]
    scale = nested_absmax.float().repeat_interleave(state.nested_blocksize)[: values.numel()]
    return values * scale + torch.tensor(state.nested_offset, dtype=torch.float32)


def decode(packed: Tensor, absmax: Tensor, state: QuantState) -> Tensor:
    """Decode packed 4-bit codes: fp32 weight of `state.shape`, on the same device.

    packed: any dtype, a bit pattern of ceil(numel / 2) bytes (padded up to its item size). absmax: fp32 [blocks], on
    the device of `packed`. Bit-identical to bitsandbytes where bitsandbytes is right, and the same on every device: one
    product a value. Raises Nf4Error when the sizes disagree.
    """
    flat = packed.contiguous().reshape(-1).view(torch.uint8)
    need = -(-state.numel // 2)
    if not need <= flat.numel() < need + packed.element_size() + 1:
        raise Nf4Error(f"{flat.numel()} packed bytes, but shape {state.shape} needs {need}")
    if state.blocksize % 2:
        raise Nf4Error(f"blocksize {state.blocksize} is odd: a byte would belong to two blocks")
    if absmax.numel() != state.blocks:
        raise Nf4Error(
            f"{absmax.numel()} scales, but shape {state.shape} in blocks of {state.blocksize} needs {state.blocks}"
        )
    values = table(state.quant_type).numpy()
    byte = np.arange(256)
    both = np.stack([values[byte >> 4], values[byte & 15]], axis=1)  # two fp32 a byte
    if packed.device.type != "cpu":
        return _decode_on_device(flat[:need], torch.from_numpy(both).to(packed.device), absmax, state)
    data, pairs = flat.numpy(), both.view(np.float64).reshape(-1)
    out = np.empty(need, dtype=np.float64)
    for start in range(0, need, _CHUNK):
        stop = min(start + _CHUNK, need)
        np.take(pairs, data[start:stop], out=out[start:stop], mode="clip")
        _scale(out.view(np.float32)[2 * start : 2 * stop], absmax.numpy(), 2 * start, state.blocksize)
    return torch.from_numpy(out.view(np.float32))[: state.numel].reshape(state.shape)


def _decode_on_device(data: Tensor, pairs: Tensor, absmax: Tensor, state: QuantState) -> Tensor:
    """`decode` in torch, for devices that NumPy does not know."""
    out = torch.empty(len(data), 2, dtype=torch.float32, device=data.device)
    for start in range(0, len(data), _CHUNK * 16):
        part = data[start : start + _CHUNK * 16]
        torch.index_select(pairs, 0, part.int(), out=out[start : start + len(part)])
    flat = out.view(-1)[: state.numel]
    whole = state.numel - state.numel % state.blocksize
    flat[:whole].view(-1, state.blocksize).mul_(absmax[: whole // state.blocksize, None])
    flat[whole:].mul_(absmax[-1])
    return flat.view(state.shape)


def _scale(values: Any, absmax: Any, first: int, blocksize: int) -> None:
    """Multiply values in place by the scales of their blocks.

    Element 0 of `values` is element `first` of the weight.
    """
    whole = len(values) - len(values) % blocksize
    if first % blocksize:  # a blocksize that does not divide the chunk
        values *= absmax[np.minimum(np.arange(first, first + len(values)) // blocksize, len(absmax) - 1)]
        return
    block = first // blocksize
    values[:whole].reshape(-1, blocksize)[...] *= absmax[block : block + whole // blocksize, None]
    values[whole:] *= absmax[block + whole // blocksize] if whole < len(values) else 1


def encode(weight: Tensor, quant_type: QuantType, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize as bitsandbytes' `quantize_4bit` does on a GPU, where training ran.

    fp32 [...] -> (bytes uint8 [ceil(numel/2)], absmax fp32 [blocks]).
    Each value times the reciprocal of its block's largest magnitude is rounded to the nearest table entry. A half goes
    down in NF4 and towards zero in FP4; bitsandbytes' CPU code (0.50) rounds it down in FP4 too. 16-bit weights have
    many.
    """
    flat = weight.float().reshape(-1)
    pad = -flat.numel() % blocksize
    blocks = torch.nn.functional.pad(flat, (0, pad)).reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1).clamp(min=1e-38)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1, 1).reshape(-1)[: flat.numel()]
    scaled = torch.nn.functional.pad(scaled, (0, flat.numel() % 2))
    codes = _nearest_nf4(scaled) if quant_type == "nf4" else _nearest_fp4(scaled)
    return (codes[::2] << 4) | codes[1::2], absmax


def _nearest_nf4(scaled: Tensor) -> Tensor:
    """Codes uint8 of values in [-1, 1]."""
    middles = ((NF4[:-1] + NF4[1:]) / 2).to(scaled.device)
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)


def _nearest_fp4(scaled: Tensor) -> Tensor:
    """Codes uint8 of values in [-1, 1]: the magnitude's, and a bit for the sign, also of a negative zero."""
    sizes = torch.bucketize(scaled.abs(), _FP4_EDGES.to(scaled.device), out_int32=True)
    codes = _FP4_BY_SIZE.to(scaled.device)[sizes.long()] + 8 * (scaled < 0)
    return codes.to(torch.uint8)


def dynamic_map() -> Tensor:
    """The signed dynamic 8-bit table with 7 exponent bits, fp32 [256], sorted.

    Source: Dettmers, arXiv:1511.04561.
    """
    values: list[float] = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        means = ((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6)).tolist()
        values += means + [-m for m in means]
    return torch.tensor(sorted(values))


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization of the scales, as bitsandbytes' CUDA kernel does it: training ran on a GPU.

    fp32 [blocks] -> (uint8 [blocks], nested_absmax fp32, offset).
    The nearest level, halves to the even code. bitsandbytes' CPU kernel (0.50) takes the level of the nearest of 65,536
    evenly spaced numbers instead: 0.2 % of scales get the neighbouring, farther level.
    """
    offset = absmax.mean()
    shifted = absmax - offset
    pad = -shifted.numel() % NESTED_BLOCK
    blocks = torch.nn.functional.pad(shifted, (0, pad)).reshape(-1, NESTED_BLOCK)
    scale = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / scale.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)[: shifted.numel()]
    return _nearest_level(scaled), scale, float(offset)


def _nearest_level(scaled: Tensor) -> Tensor:
    """Codes uint8 of the levels of `dynamic_map` nearest to values in [-1, 1], halves to the even code."""
    values = dynamic_map().to(scaled.device)
    middles = (values[:-1] + values[1:]) / 2
    codes = torch.bucketize(scaled, middles)  # a half: down
    half = scaled == middles[codes.clamp(max=len(middles) - 1)]
    return torch.where(half & (codes % 2 == 1), codes + 1, codes).to(torch.uint8)


def round_trip(weight: Tensor, quant_type: QuantType, blocksize: int, *, double_quant: bool) -> Tensor:
    """The fp32 weight that training saw: quantize as bitsandbytes would, then decode.

    Shape and order are kept.
    """
    packed, absmax = encode(weight, quant_type, blocksize)
    state = QuantState(quant_type=quant_type, blocksize=blocksize, shape=tuple(weight.shape), dtype="float32")
    if double_quant:
        codes, nested_absmax, offset = nest(absmax.cpu())  # on the CPU: the mean must not depend on the device
        state = QuantState(
            quant_type=quant_type, blocksize=blocksize, shape=tuple(weight.shape), dtype="float32", nested_offset=offset
        )
        absmax = unnest(codes, dynamic_map(), nested_absmax, state).to(weight.device)
    return decode(packed, absmax, state)
