"""fp32 matrix products: full precision or TF32 on tensor cores, set for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def tensor_cores() -> AbstractContextManager[None]:
    """Run products of fp32 matrices on a GPU's tensor cores inside the block.

    In TF32: 10 bits of mantissa, sums in fp32.
    """
    return _products("high")


def full_precision() -> AbstractContextManager[None]:
    """Run products of fp32 matrices in fp32 inside the block, whatever the process allows."""
    return _products("highest")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
