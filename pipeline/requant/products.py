"""In which precision a GPU multiplies fp32 matrices: whole, in TF32, or in parts of TF32 that together are as good as whole.

Tensors only. TF32 keeps 10 of 23 bits of mantissa and runs on tensor cores, many times faster than fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor]
LOST = 13  # bits of an fp32 mantissa that TF32 has no room for


def tensor_cores() -> AbstractContextManager[None]:
    """Products of fp32 matrices run on a GPU's tensor cores inside: TF32, 10 bits of mantissa, sums in fp32."""
    return _products("high")


def full_precision() -> AbstractContextManager[None]:
    """fp32 products in fp32 inside, whatever the process allows elsewhere."""
    return _products("highest")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_parts(tensor: Tensor) -> bool:
    """Whether products in parts are the faster ones where `tensor` is: on NVIDIA's GPUs since TF32 came."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def parts(x: Tensor) -> Parts:
    """fp32 -> (what TF32 holds of it, the rest): their sum is `x`, and TF32 rounds the rest by 2^-22 of `x` at most."""
    bits = x.view(torch.int32) + (1 << (LOST - 1))
    high = bits.bitwise_and_(-(1 << LOST)).view(torch.float32)
    return high, x - high


def add_product(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], sign: int = 1) -> None:
    """total (fp32) += sign * left @ right, both whole or both in parts: then all but the product of both rests, in TF32."""
    if len(left) == 1:
        with full_precision():
            total.addmm_(left[0], right[0], alpha=sign)
        return
    with tensor_cores():
        for a, b in ((left[0], right[1]), (left[1], right[0]), (left[0], right[0])):
            total.addmm_(a, b, alpha=sign)
