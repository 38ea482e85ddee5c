"""A merge that is not written, run block by block: weights are computed when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from requant.evaluate.variant_weights import Merged
from requant.merge.plan import MergePlan
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant_eval.scoring.batches import BatchSize


@dataclass(frozen=True, slots=True)
class Device:
    """Where and in what precision models are run, and how much at a time."""

    device: torch.device
    dtype: torch.dtype
    batch: BatchSize


def walk_of(plan: MergePlan, where: Device, *, trust_remote_code: bool) -> Walk:
    """The walk over the merged model of `plan`."""
    config: Any = skeleton.load_config(plan.base.checkpoint.path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    if plan.vocab_size is not None:
        text.vocab_size = plan.vocab_size
    if plan.untied:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    weights = Merged(plan, where.device)
    model = skeleton.build(config, trust_remote_code=trust_remote_code, stored=lambda: weights)
    return Walk(weights, model, device=where.device, dtype=where.dtype)
