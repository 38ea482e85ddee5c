"""The adapter's tensors of one module, and how PEFT spells their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from requant.adapters.config import AdapterConfig
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKey:
    """The spelling of a tensor's key in files of PEFT's save_pretrained.

    By default `base_model.model.<module>.<name>` for a tensor `name`.
    has_weight: PEFT keeps the tensor in a torch module, so the key ends in `.weight`.
    wrapper: PEFT's own module between the adapted module and the tensor.
    shared: one tensor for the whole adapter; the key is `base_model.<name>`.
    """

    has_weight: bool = False
    wrapper: str = ""
    shared: bool = False


def parameters(*names: str) -> dict[str, TensorKey]:
    """Tensors that PEFT keeps as parameters of the adapted module."""
    return dict.fromkeys(names, TensorKey())


@dataclass(frozen=True, kw_only=True)
class ModuleTensors:
    """What an adapter's files say about one module: the input of a kind's `build`.

    found: name of the tensor (a `bias` of lora_B is `lora_B.bias`) -> its header.
    shared: the tensors that belong to no module. file: the weights file, named in messages.
    """

    module: str
    found: Mapping[str, TensorInfo]
    shared: Mapping[str, TensorInfo]
    config: AdapterConfig
    file: Path

    def exactly(self, *names: str) -> list[TensorInfo]:
        """The tensors of exactly these names.

        Raises InputError when one is missing or the module has others too.
        """
        if set(names) != set(self.found):
            raise self.error(f"{self.module} has {', '.join(sorted(self.found))}; expected {', '.join(names)}")
        return [self.found[n] for n in names]

    def error(self, message: str) -> InputError:
        """An InputError that names the weights file."""
        return InputError(f"{self.file}: {message}")
