"""Whether all values of a tensor are finite.

By its extremes, which are NaN where a value is: many times faster than `torch.isfinite` on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity. values: any floats of 16 bit or more, or integers."""
    if not values.numel() or not values.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def count_not_finite(values: Tensor) -> int:
    """How many values are NaN or infinity. values: any floats of 16 bit or more, or integers."""
    return 0 if all_finite(values) else int((~torch.isfinite(values)).sum())
