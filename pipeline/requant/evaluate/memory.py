"""How much memory a variant takes while it is scored, whole or block by block, from headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from requant.checkpoint.reader import Checkpoint
from requant.evaluate import variant_weights
from requant.evaluate.variants import VariantSources
from requant.modeling import skeleton
from requant.modeling.block_walk import block_linears, block_list
from requant_eval.scoring.score_loop import CHUNK_LOGITS

__all__ = ["CHUNK_LOGITS", "Size"]

PACKED = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight in NF4, its nested scales included; fp32 scales: 0.5625
LOGITS = 6 * 4  # bytes for each logit of a chunk: two models' logits, their softmaxes, and what KL makes of them


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of parameters, of the whole and of its parts. traffic: inputs and outputs of all linears of a block."""

    total: int
    packed: int  # held in 4 bits by bitsandbytes when the variant is resident
    block: int  # the largest one
    layers: int
    outside: int  # of all blocks
    width: int
    vocabulary: int
    traffic: int
    largest: int  # matrix
    adapter: int = 0  # bytes

    @classmethod
    def of(cls, name: str, sources: VariantSources) -> Size:
        """From the variant's structure and, of base and adapter, the headers of the base."""
        quantized = name in ("base", "adapter")
        paths = {"base": sources.base, "adapter": sources.base, "gptq": sources.gptq, "healed": sources.healed}
        trust = sources.trust_remote_code
        path = paths.get(name) or sources.merged
        model = skeleton.open_model(path, trust_remote_code=trust)
        packed = 0
        if quantized:
            base = variant_weights.open_base(Checkpoint(path), model, sources.simulate)
            packed = sum(_count(w.shape) for w in base.weights.values() if w.kind != "stored")
        loaded = sources.plan.adapters if name == "adapter" and sources.plan else ()
        return cls.of_model(model, packed, 4 * sum(_count(t.shape) for a in loaded for t in a.tensors.values()))

    @classmethod
    def of_model(cls, model: Any, packed: int = 0, adapter: int = 0) -> Size:
        _, blocks = block_list(model)
        counts = [_parameters(block) for block in blocks]
        total = _parameters(model)
        embedding = model.get_input_embeddings()
        linears = max((list(block_linears(b).values()) for b in blocks), key=len)
        return cls(
            total, packed, max(counts), len(blocks), total - sum(counts), embedding.embedding_dim,
            embedding.num_embeddings, sum(m.in_features + m.out_features for m in linears),
            max((m.weight.numel() for m in linears), default=0), adapter,
        )  # fmt: skip

    def resident(self, item: int, tokens: int, chunk: int) -> int:
        """Bytes to score it whole. item: bytes of a number. tokens: in a batch. chunk: logits alive at a time."""
        held = (self.total - self.packed) * item + self.packed * PACKED + self.adapter
        decoded = self.largest * (item + 4) if self.packed else 0
        return int(held + decoded + self._work(item, tokens, chunk))

    def streamed(self, item: int, tokens: int, chunk: int, waiting: int, ahead: bool) -> int:
        """Bytes to score it block by block. waiting: tokens whose hidden states wait on the device. ahead: the next block too."""
        blocks = (2 if ahead else 1) * self.block * item + self.largest * 4
        states = (waiting + tokens) * self.width * item
        return int(blocks + self.outside * item + self.adapter + states + self._work(item, tokens, chunk))

    def _work(self, item: int, tokens: int, chunk: int) -> int:
        """Activations of one batch, the reference's head and the logits. Not all inputs and outputs live at once."""
        head = self.vocabulary * self.width * item
        return max(tokens * (self.traffic * 3 // 4 + 4 * self.width) * item, LOGITS * chunk) + head


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count(shape: Iterable[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
