"""The package gguf, which reads and writes the files; it is imported when it is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from requant.errors import InputError


def package() -> Any:
    """The package gguf, or InputError."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def stored_bytes_of(tensor: Any) -> Tensor:
    """The bytes of a tensor that the package gguf read, uint8."""
    return torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8)
