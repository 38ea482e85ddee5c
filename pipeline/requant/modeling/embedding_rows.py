"""Refuses texts with tokens that the model has no embedding for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from requant.errors import InputError


def refuse_unknown_ids(ids: Mapping[str, Iterable[Tensor]], rows: int, tokenizer: Any, advice: str) -> None:
    """Raise InputError naming the text and the token; a tokenizer may have ids beyond the embedding that no text uses.

    ids: int64 token ids of every text by what it is. rows: of the embedding. advice: what is wrong, and what to do.
    """
    for what, parts in ids.items():
        largest = max((int(part.max()) for part in parts), default=-1)
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(f"{what} holds token {largest} ({token!r}), but the model has {rows} embeddings: {advice}")
