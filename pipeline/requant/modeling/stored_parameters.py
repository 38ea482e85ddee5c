"""Parameters of routers that a checkpoint holds transposed, or several in one tensor.

The model holds the file's tensor, and the class's modules show what they expect of it. So every parameter is a tensor
of the file, and is merged into and written as servers read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from requant.modeling import conversions
from requant.modeling.cut_linears import JOINED


class JoinedParameter(nn.Module):
    """One tensor of the file, of which several modules of the class have a part each."""

    def __init__(self, leaf: str, value: Tensor) -> None:
        super().__init__()
        self.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def expose(model: nn.Module, rules: Iterable[Any]) -> None:
    """Give a model on the meta device the parameters as its files hold them, in place.

    rules: transformers' conversions for the model.
    """
    for rule in rules:
        if conversions.is_transposed(rule):
            for module, leaf in _owners(model, rule.target_patterns[0]):
                _transpose(model.get_submodule(module), leaf)
        elif [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations] == [("Chunk", 0)]:
            for module, leaf in _owners(model, rule.target_patterns[0]):
                first = rule.target_patterns[0].rpartition(".")[0]
                others = [t.rpartition(".")[0] for t in rule.target_patterns]
                _join(model, [module.removesuffix(first) + other for other in others], leaf)


def transposed(model: nn.Module) -> set[str]:
    """Names of the modules whose `weight` the file holds transposed."""
    return {name for name, module in model.named_modules() if getattr(module, "_stored_transposed", None) == "weight"}


def _owners(model: nn.Module, target: str) -> Iterator[tuple[str, str]]:
    """(module, parameter) of every parameter that a conversion makes, Linears' apart."""
    stem, _, leaf = target.rpartition(".")
    for name, module in list(model.named_modules()):
        if f".{name}".endswith(f".{stem}") and leaf in module._parameters and not isinstance(module, nn.Linear):
            yield name, leaf


def _transpose(module: Any, leaf: str) -> None:
    """Hold the transposed parameter; the attribute shows it as the class has it."""
    value = module._parameters[leaf]
    module._parameters[leaf] = nn.Parameter(value.T.contiguous(), requires_grad=False)
    module._stored_transposed = leaf
    _show(module, leaf, lambda self: self._parameters[leaf].T)


def _join(model: nn.Module, owners: list[str], leaf: str) -> None:
    """Hold one parameter for those of the modules `owners`; their attributes show rows of it."""
    modules: list[Any] = [model.get_submodule(name) for name in owners]
    joined = JoinedParameter(leaf, torch.cat([module._parameters[leaf] for module in modules]))
    first = 0
    for module in modules:
        rows = slice(first, first := first + module._parameters.pop(leaf).shape[0])
        module._stored_in, module._stored_rows = (joined,), rows  # in a tuple: no module inside of this one
        _show(module, leaf, lambda self: self._stored_in[0]._parameters[leaf][self._stored_rows])
    owner, _, last = owners[0].rpartition(".")
    setattr(model.get_submodule(owner), last + JOINED, joined)


def _show(module: nn.Module, leaf: str, value: Callable[[Any], Tensor]) -> None:
    """Let the attribute `leaf` of one module be what `value` makes of it."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {leaf: property(value)})
