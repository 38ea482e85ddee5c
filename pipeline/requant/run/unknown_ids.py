"""Refuses texts with tokens that the model has no embedding for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from requant.errors import InputError
from requant.merge.plan import MergePlan
from requant.run.heal_recipe import Healing
from requant.run.prepared import Texts


def refuse_unknown_ids(texts: Texts, healing: Healing | None, plan: MergePlan, tokenizer: Any) -> None:
    """Raise InputError naming the text and the token.

    A tokenizer may be longer than the embedding: only ids that a text uses count.
    """
    rows = plan.embedding_rows
    if rows is None:
        return
    for what, parts in _ids(texts, healing).items():
        unknown = [int(part.max()) for part in parts if int(part.max()) >= rows]
        if unknown:
            token = tokenizer.convert_ids_to_tokens(unknown[0])
            raise InputError(
                f"{what} holds token {unknown[0]} ({token!r}), but the model has {rows} embeddings: training used "
                "another vocabulary. Put the tokenizer of the training run beside the adapter; if it is there, save "
                "embed_tokens and lm_head with the adapter, or look whether it belongs to another base"
            )


def _ids(texts: Texts, healing: Healing | None) -> dict[str, Iterable[Tensor]]:
    """Token ids of every text by what it is."""
    return {
        "the calibration text": [texts.calibration],
        "the healing text": [healing.text.windows] if healing else [],
        **{f"evaluation set {s.name}": [w.ids for w in s.windows] for s in texts.sets},
        "a canary": [torch.tensor(c.ids) for c in texts.canaries.items] if texts.canaries else [],
    }
