"""Linears that a checkpoint holds as one matrix, and the class as several: qkv of towers.

The one matrix is a Linear of the model here, beside the class's modules, which show rows of it. So every parameter is
a tensor of the file, and is quantized and written as servers read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

JOINED = "_joined"
"""Behind the name of the first part: the name of the Linear that holds all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Where a module of the class is: rows of the Linear `joined`, which has `total` of them.

    rows: their numbers in the file, in the class's order, which may be another one.
    """

    joined: str
    rows: Sequence[int]
    total: int

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        """The module's part of `values`, whose dimension `dim` is that of the rows."""
        if isinstance(self.rows, range):
            return values.narrow(dim, self.rows.start, len(self.rows))
        return values.index_select(dim, torch.tensor(self.rows, device=values.device))


class _Output:
    """The joined Linear's last output, computed once and kept until every part has had it."""

    def __init__(self, parts: int) -> None:
        self.parts = self.left = parts
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def of(self, joined: nn.Linear, value: Tensor) -> Tensor:
        if self.input is not value:
            self.output, self.input, self.left = joined(value), value, self.parts
        output = self.output
        assert output is not None
        self.left -= 1
        if self.left <= 0:
            self.input = self.output = None
        return output


class CutLinear(nn.Linear):
    """A Linear of the class whose weight is rows of a joined one; it has no parameter of its own."""

    def __init__(self, joined: nn.Linear, cut: Cut, output: _Output) -> None:
        nn.Module.__init__(self)
        self.joined, self.cut, self.output = (joined,), cut, output  # in a tuple: no module inside of this one
        self.in_features, self.out_features = joined.in_features, len(cut.rows)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.cut.of(self.joined[0].weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.joined[0].bias
        return None if bias is None else self.cut.of(bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.cut.of(self.output.of(self.joined[0], input), -1)


def rules(conversions: Iterable[Any]) -> list[Any]:
    """Those of transformers' conversions that cut or reorder the rows of one matrix."""
    return [rule for rule in conversions if is_cut(rule)]


def is_cut(rule: Any) -> bool:
    """Whether a conversion of transformers cuts the rows of one matrix, or reorders them, or both."""
    operations = steps(rule)
    operations = operations[operations[0] == ("Interleave", 0) :]
    cuts = bool(operations) and operations[0][0] in ("Chunk", "Split")
    return (
        len(rule.source_patterns) == 1
        and cuts == (len(rule.target_patterns) > 1)
        and (not cuts or operations[0][1] == 0)
        and all(name == "PermuteForRope" for name, _ in operations[cuts:])
    )


def steps(rule: Any) -> list[tuple[str, int | None]]:
    """(operation, its dimension) of each step of a conversion."""
    return [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]


def renamed(name: str, rules: Iterable[Any]) -> str:
    """A stored name, other renamings done, as the model with its joined Linears calls it. rules: that cut."""
    for rule in rules:
        target, pattern = rule.rename_source_key(name)
        if pattern is not None:
            owner, _, leaf = target.rpartition(".")
            return f"{owner}{JOINED}.{leaf}"
    return name


def expose(model: nn.Module, rules: Iterable[Any], stored: Iterable[str]) -> None:
    """Join the Linears of a model on the meta device that its checkpoint holds in one, in place.

    stored: names of the weights in the checkpoint, other renamings done.
    """
    names = list(stored)
    prefix = getattr(model, "base_model_prefix", "") + "."
    for rule in rules:
        leaves = [_leaf(pattern) for pattern in rule.target_patterns]
        for name in names:
            target, pattern = rule.rename_source_key(name)
            module = target.removesuffix(".weight")
            if pattern is None or module == target or not module.endswith(leaves[0]):
                continue
            owner = module.removesuffix(leaves[0])
            owner = owner if owner.startswith(prefix) or not _there(model, prefix + module) else prefix + owner
            if all(_there(model, owner + leaf) for leaf in leaves):
                _join(model, [owner + leaf for leaf in leaves], rule)


def _there(model: nn.Module, name: str) -> bool:
    try:
        return type(model.get_submodule(name)) is nn.Linear
    except AttributeError:
        return False


def _leaf(pattern: str) -> str:
    """The module that the pattern of a conversion names."""
    return pattern.replace("\\", "").removesuffix(".weight").removesuffix(".")


def _join(model: Any, names: list[str], rule: Any) -> None:
    """Replace the Linears `names` by rows of one."""
    old: list[Any] = [model.get_submodule(name) for name in names]
    total, first = sum(part.out_features for part in old), 0
    joined = nn.Linear(old[0].in_features, total, bias=old[0].bias is not None, device="meta").requires_grad_(False)
    output = _Output(len(old))
    setattr(*_place(model, names[0] + JOINED), joined)
    places = _sorted_rows(rule, total)
    for name, part, pattern in zip(names, old, rule.target_patterns, strict=True):
        order = [places[first + i] for i in _order(model, rule, pattern, part.out_features)]
        whole = range(first, first + len(order))
        rows = whole if order == [*whole] else tuple(order)
        cut = Cut(joined=names[0] + JOINED, rows=rows, total=total)
        setattr(*_place(model, name), CutLinear(joined, cut, output))
        first += part.out_features


def _sorted_rows(rule: Any, total: int) -> list[int]:
    """The file's rows as a conversion sorts them before it cuts: where gate and up take turns, gate's come first."""
    sorts = steps(rule)[0][0] == "Interleave"
    return [*range(0, total, 2), *range(1, total, 2)] if sorts else [*range(total)]


def _order(model: Any, rule: Any, pattern: str, rows: int) -> list[int]:
    """The file's rows of one part in the class's order: what the conversion makes of their numbers."""
    numbers: Any = torch.arange(rows)
    for operation in rule.operations:
        if type(operation).__name__ == "PermuteForRope":
            found = operation.convert(
                {pattern: numbers}, rule.source_patterns, rule.target_patterns, config=model.config
            )
            numbers = next(iter(found.values()))
    return [int(number) for number in numbers]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def cuts(model: nn.Module) -> dict[str, Cut]:
    """Module of the class -> where it is in the joined Linear, of every one that the file holds so."""
    return {name: module.cut for name, module in _cut_linears(model)}


def parts(model: nn.Module) -> dict[str, tuple[Sequence[int], ...]]:
    """Joined Linear -> the rows of each of its parts, in the order of the class."""
    found: dict[str, tuple[Sequence[int], ...]] = {}
    for _, module in _cut_linears(model):
        found[module.cut.joined] = (*found.get(module.cut.joined, ()), module.cut.rows)
    return found


def _cut_linears(model: nn.Module) -> Iterator[tuple[str, CutLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, CutLinear))
