"""Refuses texts with tokens that the model has no embedding for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from requant.errors import InputError
from requant.run.heal_recipe import Healing
from requant.run.prepared import Texts

OF_TRAINING = (
    "training used another vocabulary. Put the tokenizer of the training run beside the adapter; if it is there, save "
    "embed_tokens and lm_head with the adapter, or look whether it belongs to another base"
)


def refuse_unknown_ids(ids: Mapping[str, Iterable[Tensor]], rows: int, tokenizer: Any, advice: str) -> None:
    """Raise InputError naming the text and the token; a tokenizer may have ids beyond the embedding that no text uses.

    ids: int64 token ids of every text by what it is. rows: of the embedding. advice: what is wrong, and what to do.
    """
    for what, parts in ids.items():
        largest = max((int(part.max()) for part in parts), default=-1)
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(f"{what} holds token {largest} ({token!r}), but the model has {rows} embeddings: {advice}")


def ids_of(texts: Texts, healing: Healing | None) -> dict[str, Iterable[Tensor]]:
    """Token ids of every text by what it is."""
    return {
        "the calibration text": [texts.calibration],
        "the healing text": [healing.text.windows] if healing else [],
        **{f"evaluation set {s.name}": [w.ids for w in s.windows] for s in texts.sets},
        "a canary": [torch.tensor(c.ids) for c in texts.canaries.items] if texts.canaries else [],
    }
