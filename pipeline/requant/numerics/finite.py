"""The largest magnitude of a tensor, and whether all its values are finite.

By its extremes, which are NaN where a value is: many times faster than `torch.isfinite` on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_magnitude(tensor: Tensor) -> float:
    """max |x|, NaN if any is; without a copy of the tensor."""
    low, high = (float(v) for v in torch.aminmax(tensor))
    return high if high > -low else -low


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity. values: any floats of 16 bit or more, or integers."""
    if not values.numel() or not values.is_floating_point():
        return True
    return math.isfinite(largest_magnitude(values))


def count_not_finite(values: Tensor) -> int:
    """How many values are NaN or infinity. values: any floats of 16 bit or more, or integers."""
    return 0 if all_finite(values) else int((~torch.isfinite(values)).sum())
