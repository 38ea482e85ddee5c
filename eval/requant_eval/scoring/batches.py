"""Batches: which windows run together, padded on the right to the longest of them.

A causal model computes a position from those before it alone, so what follows a window changes nothing but the order of
sums. That a model is one is not believed: `padding_changes` compares a padded window with the same window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError

# Of a padded window's final hidden states from the same window's alone: the median over its positions, relative. Some
# ten times what another batch size changes by rounding; a router that is undecided changes few positions, and far.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
APART = "{}: what follows a window changes its hidden states, so windows of different lengths were scored apart"
BY_LENGTH = ("dynamic", "longrope")  # rotary tables that depend on the longest position of a batch


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How much runs at a time; one window always does.

    windows, tokens: at most, padding included; one of them may be None, no limit. padding: tokens of it in a batch at
    most, as many as another forward costs.
    """

    windows: int | None = None
    tokens: int | None = None
    padding: int = 16

    def __post_init__(self) -> None:
        if min(self._limits, default=0) < 1:
            raise EvaluationError(f"batch is {min(self._limits, default=0)}, needs at least 1")

    @property
    def _limits(self) -> list[int]:
        return [limit for limit in (self.windows, self.tokens) if limit is not None]

    @classmethod
    def of(cls, batch: BatchSize | int) -> BatchSize:
        """A number of windows as a size."""
        return batch if isinstance(batch, BatchSize) else cls(windows=batch)

    def holds(self, count: int, length: int) -> bool:
        """Whether a batch may have `count` windows of `length` tokens, padding included."""
        fits = self.tokens is None or count * length <= self.tokens
        return count == 1 or (fits and (self.windows is None or count <= self.windows))

    def rows(self, length: int) -> int:
        """Windows of one length at a time."""
        limits = (self.windows, None if self.tokens is None else self.tokens // length)
        return max(1, min(limit for limit in limits if limit is not None))

    def halved(self, largest: int) -> BatchSize:
        """Half of it. largest: windows of the largest batch that it allowed."""
        tokens = None if self.tokens is None else max(1, self.tokens // 2)
        return replace(self, windows=-(-largest // 2), tokens=tokens)


@dataclass(frozen=True)
class Plan:
    """Batches, each with its longest window first. batches: numbers of the windows. lengths: of every window."""

    batches: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Windows of the largest batch."""
        return max(map(len, self.batches))

    @property
    def tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        return max(len(batch) * self.lengths[batch[0]] for batch in self.batches)

    @property
    def widest(self) -> int | None:
        """The batch whose shortest window is padded most; None: no window is padded."""
        padding = [self.lengths[batch[0]] - self.lengths[batch[-1]] for batch in self.batches]
        return padding.index(max(padding)) if max(padding) else None


def plan(lengths: Sequence[int], size: BatchSize, *, padded_up_to: int | None = None) -> Plan:
    """The batches of windows of these lengths, longest first.

    padded_up_to: longer windows share a batch with windows of their own length only, and come last, the shortest of
    them first: transformers keeps a rotary table until a longer window, or one of less than the trained length, needs
    another. None: there is no such length.
    """
    limit = max(lengths, default=0) if padded_up_to is None else padded_up_to
    found: list[list[int]] = []
    padding = 0
    for number in sorted(range(len(lengths)), key=lambda i: (lengths[i] > limit, abs(lengths[i] - limit))):
        longest = lengths[found[-1][0]] if found else 0
        padding += longest - lengths[number]
        allowed = size.padding if longest <= limit else 0
        if lengths[number] <= longest and padding <= allowed and size.holds(len(found[-1]) + 1, longest):
            found[-1].append(number)
        else:
            found.append([number])
            padding = 0
    return Plan(tuple(map(tuple, found)), tuple(lengths))


def padded(windows: Sequence[Tensor]) -> Tensor:
    """int64 [n, longest] of windows int64 [length], the longest first; the others' last token is repeated."""
    longest = len(windows[0])
    return torch.stack([torch.cat((w, w[-1:].expand(longest - len(w)))) for w in windows])


def padded_up_to(config: Any) -> int | None:
    """The length of window from which padding changes rotary tables, by a model's config; None: it never does."""
    text = config.get_text_config()
    tables = getattr(text, "rope_parameters", None) or {}
    kinds = [tables, *(t for t in tables.values() if isinstance(t, dict))]  # one for all layers, or one a type of layer
    trained = getattr(text, "max_position_embeddings", 1)
    limits = [
        int(table.get("original_max_position_embeddings") or trained)
        for table in kinds
        if table.get("rope_type") in BY_LENGTH
    ]
    return min(limits, default=None)


def padding_changes(padded_states: Tensor, alone: Tensor) -> bool:
    """Whether the final hidden states of a padded window are not those of the window alone.

    padded_states: [at least length, hidden]. alone: [length, hidden].
    """
    expected = alone.double()
    difference = (padded_states[: len(alone)].double() - expected).norm(dim=-1)
    relative = difference / expected.norm(dim=-1).clamp_min(1e-30)
    return not bool(relative.median() <= TOLERANCE[alone.dtype])
