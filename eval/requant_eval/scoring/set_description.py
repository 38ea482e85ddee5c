"""What identifies an evaluation set and how much is in it, without tokens and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Protocol = Literal["documents", "gptq-2048", "llamacpp-512"]


@dataclass(frozen=True, kw_only=True)
class SetDescription:
    """An evaluation set without its tokens: what the report has of it besides scores.

    digest: sets with the same digest have the same tokens, masks and documents.
    window: tokens per window, BOS included. bos: whether every window starts with a BOS.
    n_documents: clusters with at least one scored token.
    n_bytes: UTF-8 bytes of the scored text, 0 = unknown; where a document is scored in part, its bytes are counted in
    proportion to its scored tokens.
    dropped: tokens in dropped tails.
    """

    name: str
    digest: str
    protocol: Protocol
    window: int
    bos: bool
    n_documents: int
    n_scored: int
    n_bytes: int
    dropped: int
