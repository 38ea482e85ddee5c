"""The package gguf, which reads and writes the files; it is imported when it is needed."""

from __future__ import annotations

from pathlib import Path
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


def open_file(path: Path) -> Any:
    """The package's reader of a GGUF file; raises what it raises.

    It takes a view of a memory map for each token and each merge, which are three times slower than those of an array.
    """
    base = package().GGUFReader

    def of_array(self: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return base._get(self, *arguments, **options)

    return type("ArrayReader", (base,), {"_get": of_array})(path)


def stored_bytes_of(tensor: Any) -> Tensor:
    """The bytes of a tensor that the package gguf read, uint8."""
    return torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8)
