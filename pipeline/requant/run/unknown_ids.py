"""The token ids of all texts of a run, and what it means where a model lacks one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from requant.run.heal_recipe import Healing
from requant.run.prepared import Texts

OF_TRAINING = (
    "training used another vocabulary. Put the tokenizer of the training run beside the adapter; if it is there, save "
    "embed_tokens and lm_head with the adapter, or look whether it belongs to another base"
)


def ids_of(texts: Texts, healing: Healing | None) -> dict[str, Iterable[Tensor]]:
    """Token ids of every text by what it is."""
    return {
        "the calibration text": [texts.calibration],
        "the healing text": [healing.text.windows] if healing else [],
        **{f"evaluation set {s.name}": [w.ids for w in s.windows] for s in texts.sets},
        "a held-out prompt": [torch.tensor(p.ids) for p in texts.prompts.items] if texts.prompts else [],
        "a canary": [torch.tensor(c.ids) for c in texts.canaries.items] if texts.canaries else [],
    }
