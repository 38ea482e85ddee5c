"""Token embeddings and head of a model, and the bits that are asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from requant.errors import InputError
from requant.modeling import skeleton
from requant.modeling.joined_parts import joined
from requant.numerics.grid import Grid

SEARCHED = 4  # bits up to which scales are searched: at 8 that takes 2 to 7 % off an error of 1 % (bench/ends.py)


@dataclass(frozen=True, kw_only=True, slots=True)
class EndBits:
    """Bits of token embeddings and head, None: they stay as they are. group_size: None: as most linears have it."""

    embeddings: int | None = None
    head: int | None = None
    group_size: int | None = None

    def __bool__(self) -> bool:
        return self.embeddings is not None or self.head is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEnds:
    """The modules' names. tied: both are one matrix, that of the embeddings. tables: in how many files hold these."""

    embeddings: str
    head: str | None
    tied: bool
    tables: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> TokenEnds:
        """Those of a model's skeleton."""
        names = {id(module): name for name, module in model.named_modules()}
        ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
        head = None if ends[1] is None else names[id(ends[1])]
        inner = names[id(ends[0])]
        tables = len(joined(model).get(inner, (inner,)))
        return cls(embeddings=inner, head=head, tied=skeleton.tied_pair(model) is not None, tables=tables)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The modules that have a matrix of their own."""
        return (self.embeddings,) if self.tied or self.head is None else (self.embeddings, self.head)

    def grids(self, asked: EndBits, group_size: int) -> dict[str, Grid]:
        """Module -> its grid, of what is asked for. Raises InputError where it cannot be meant."""
        bits = {self.embeddings: asked.embeddings}
        if asked.embeddings is not None and self.tables > 1:
            raise InputError(
                f"files of this model hold its token embeddings in {self.tables} tables, which no server reads "
                "quantized: leave quantize.embeddings out"
            )
        if self.tied:
            if None not in (asked.embeddings, asked.head) and asked.embeddings != asked.head:
                raise InputError(
                    f"embeddings and head of this model are one matrix: it cannot have {asked.embeddings} and "
                    f"{asked.head} bits: set one of the two"
                )
            bits[self.embeddings] = asked.embeddings or asked.head
        elif asked.head is not None and self.head is None:
            raise InputError("this model has no head of its own to quantize: leave quantize.head out")
        elif self.head is not None:
            bits[self.head] = asked.head
        return {name: end_grid(b, asked.group_size or group_size) for name, b in bits.items() if b is not None}


def end_grid(bits: int, group_size: int) -> Grid:
    """The symmetric grid of embeddings or a head, which no calibration text chooses."""
    return Grid(bits, group_size, search="hessian" if bits <= SEARCHED else "minmax")


def other_tables(model: nn.Module, ends: Mapping[str, Grid]) -> tuple[str, ...]:
    """The embeddings of a model, of positions and others, that are not among `ends`."""
    return tuple(n for n, module in model.named_modules() if isinstance(module, nn.Embedding) and n not in ends)
