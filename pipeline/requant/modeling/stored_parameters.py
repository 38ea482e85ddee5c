"""Parameters that a file holds transposed, several in one, or gate and up row by row.

The model holds the file's tensor, and the class's modules show what they expect of it. So every parameter is a tensor
of the file, and is merged into and written as servers read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from requant.modeling import conversions, cut_linears
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
        elif conversions.is_interleaved(rule):
            for module, leaf in _owners(model, rule.target_patterns[0]):
                _interleave(model.get_submodule(module), leaf)
        elif conversions.is_halved(rule):
            for module, _ in _owners(model, rule.target_patterns[0]):
                _halve(model.get_submodule(module), rule.target_patterns)
        elif cut_linears.steps(rule) == [("Chunk", 0)]:
            for module, leaf in _owners(model, rule.target_patterns[0]):
                first = rule.target_patterns[0].rpartition(".")[0]
                others = [t.rpartition(".")[0] for t in rule.target_patterns]
                _join(model, [module.removesuffix(first) + other for other in others], leaf)


def transposed(model: nn.Module) -> set[str]:
    """Names of the modules whose `weight` the file holds transposed."""
    return {name for name, module in model.named_modules() if getattr(module, "_stored_transposed", None) == "weight"}


def halves(module: nn.Module) -> tuple[str, ...]:
    """The parameters of the class whose rows the file holds in turns, in one stack; () in none or another module."""
    return tuple(getattr(module, "_stored_halves", ()))


def interleaved(module: nn.Module) -> str | None:
    """The stacked parameter of a module whose rows of gate and up the file holds in turns."""
    return getattr(module, "_stored_interleaved", None)


def _owners(model: nn.Module, target: str) -> Iterator[tuple[str, str]]:
    """(module, parameter) of every parameter that a conversion makes, Linears' apart."""
    stem, _, leaf = target.rpartition(".")
    for name, module in list(model.named_modules()):
        if (
            (not stem or f".{name}".endswith(f".{stem}"))
            and leaf in module._parameters
            and not isinstance(module, nn.Linear)
        ):
            yield name, leaf


def _transpose(module: Any, leaf: str) -> None:
    """Hold the transposed parameter; the attribute shows it as the class has it."""
    value = module._parameters[leaf]
    module._parameters[leaf] = nn.Parameter(value.T.contiguous(), requires_grad=False)
    module._stored_transposed = leaf
    _show(module, leaf, lambda self: self._parameters[leaf].T)


def _interleave(module: Any, leaf: str) -> None:
    """Hold [experts, rows, columns] as it is in the file; the attribute shows the rows of gate, then those of up."""
    module._stored_interleaved = leaf
    _show(module, leaf, lambda self: torch.cat([self._parameters[leaf][:, place::2] for place in (0, 1)], dim=1))


def _halve(module: Any, leaves: Sequence[str]) -> None:
    """Hold one stack for two parameters of a module; the attributes show the rows of each."""
    whole = torch.cat([module._parameters.pop(leaf) for leaf in leaves], dim=1)
    held = leaves[0] + JOINED
    module.register_parameter(held, nn.Parameter(whole, requires_grad=False))
    module._stored_halves = tuple(leaves)
    for place, leaf in enumerate(leaves):
        _show(module, leaf, partial(_every_other_row, leaf=held, place=place))


def _every_other_row(module: Any, *, leaf: str, place: int) -> Tensor:
    """The rows of a stack [experts, rows, columns] that are of one half."""
    stack: Tensor = module._parameters[leaf]
    return stack[:, place::2]


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
    """Let the attribute `leaf` of one module be what `value` makes of it.

    Where PEFT has put another tensor in the parameter's place, as it does on stacks of experts, it is that one.
    """
    kind = type(module)

    def shown(self: Any) -> Tensor:
        try:
            return value(self)
        except KeyError as error:
            raise AttributeError(leaf) from error  # then torch looks among the buffers

    module.__class__ = type(kind.__name__, (kind,), {leaf: property(shown)})
