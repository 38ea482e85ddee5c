"""Model classes instantiated without the memory and the time of their parameters.

accelerate moves a parameter to the meta device once it is made. Until then it is on the CPU, and what `torch.zeros`
makes is written to memory: the experts of one layer of Llama 4 are 5 GB. So tensors that large are made on meta, unless
a model computes a buffer with them, as StarCoder its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LARGE = 2**25  # elements
_FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))


class LargeOnMeta(TorchFunctionMode):
    """Inside it, factories of torch make tensors of more than `LARGE` elements on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("out") is None:
            elsewhere = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
            made = func(*args, **elsewhere | {"device": "meta"})
            if made.numel() > LARGE:
                return made
        return func(*args, **kwargs)


@contextmanager
def without_weights(*, large_on_meta: bool = True) -> Iterator[None]:
    """A block in which model classes hold their parameters on the meta device, and their buffers on the CPU.

    large_on_meta: large tensors are made there, also those of buffers.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with (
        init_empty_weights(include_buffers=False),
        no_init_weights(),
        LargeOnMeta() if large_on_meta else nullcontext(),
    ):
        yield
