"""Splits a dimension into blocks."""

from __future__ import annotations


def blocks_of(stop: int, size: int) -> list[slice]:
    """Slices of `size` from 0 to `stop`, in order; the last one may be shorter."""
    return [slice(start, min(start + size, stop)) for start in range(0, stop, size)]
