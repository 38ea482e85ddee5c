"""A merge that is not written, run block by block: weights are computed when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.pieces import Piece
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


class PiecewiseMerged(Merged):
    """The weights of a merge, with pieces of its stacked tensors; each of these is computed once for its pieces."""

    def __init__(self, plan: MergePlan, device: torch.device, pieces: Mapping[str, Piece]) -> None:
        super().__init__(plan, device)
        self.pieces = pieces
        self._kept: dict[str, Tensor] = {}  # the last stacked tensors read: weights and biases, of two projections

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from self.pieces

    def __contains__(self, name: object) -> bool:
        return name in self.pieces or super().__contains__(name)

    def read(self, name: str) -> Tensor:
        if name not in self.pieces:
            return super().read(name)
        piece = self.pieces[name]
        if piece.stacked not in self._kept:
            self._kept = dict([*self._kept.items(), (piece.stacked, super().read(piece.stacked))][-4:])
        return piece.of(self._kept[piece.stacked]).contiguous()


def walk_of(
    plan: MergePlan, where: Device, *, trust_remote_code: bool, pieces: Mapping[str, Piece] | None = None
) -> Walk:
    """The walk over the merged model of `plan`.

    pieces: of its stacked experts, which are then single Linears; None: experts are as the base holds them.
    """
    config: Any = skeleton.load_config(plan.base.checkpoint.path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    if plan.vocab_size is not None:
        text.vocab_size = plan.vocab_size
    if plan.untied:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    weights = Merged(plan, where.device) if pieces is None else PiecewiseMerged(plan, where.device, pieces)
    split = pieces is not None
    model = skeleton.build(config, trust_remote_code=trust_remote_code, stored=lambda: weights, split=split)
    return Walk(weights, model, device=where.device, dtype=where.dtype)
