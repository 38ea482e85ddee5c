"""Memory that a variant takes while it is scored, estimated from headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from requant.evaluate import variant_weights
from requant.evaluate.variant_sources import VariantSources
from requant.merge.base_checkpoint import open_base_checkpoint
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list, kinds
from requant.runtime.device import USABLE

BYTES_PER_NF4_WEIGHT = 0.5 + 1 / 64 + 4 / 64 / 256  # with nested scales; with fp32 scales 0.5625


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSize:
    """Numbers of parameters of a variant and its parts.

    inputs_outputs: sum of the widths of a block's linears.
    """

    total: int
    packed: int  # held in 4 bits by bitsandbytes when the variant is resident
    block: int  # the largest one
    layers: int
    outside: int  # of all blocks
    width: int
    vocabulary: int
    inputs_outputs: int
    largest: int  # matrix
    adapter: int = 0  # bytes

    @classmethod
    def of(cls, name: str, sources: VariantSources) -> VariantSize:
        """The size of a variant from its structure.

        The sizes of base and adapter need the headers of the base too.
        """
        quantized = name in ("base", "adapter")
        paths = {"base": sources.base, "adapter": sources.base, "gptq": sources.gptq, "healed": sources.healed}
        paths |= {"ends": sources.deployed, "gptqmodel": sources.gptqmodel}
        trust = sources.trust_remote_code
        path = paths.get(name) or sources.merged
        model = skeleton.open_model(path, trust_remote_code=trust)
        packed = 0
        if quantized:
            base = variant_weights.open_base(open_base_checkpoint(path), model, sources.simulate)
            packed = sum(_count(w.shape) for w in base.weights.values() if w.four_bit)
        loaded = sources.plan.adapters if name == "adapter" and sources.plan else ()
        return cls.of_model(model, packed, 4 * sum(_count(t.shape) for a in loaded for t in a.tensors.values()))

    @classmethod
    def of_model(cls, model: Any, packed: int = 0, adapter: int = 0) -> VariantSize:
        """The size of a model. packed: weights held in 4 bits. adapter: bytes."""
        _, blocks = block_list(model)
        counts = [_parameters(block) for block in blocks]
        total = _parameters(model)
        embedding = model.get_input_embeddings()
        linears = [list(block_linears(block).values()) for block in kinds(blocks)]
        return cls(
            total=total,
            packed=packed,
            block=max(counts),
            layers=len(blocks),
            outside=total - sum(counts),
            width=embedding.embedding_dim,
            vocabulary=embedding.num_embeddings,
            inputs_outputs=max(sum(m.in_features + m.out_features for m in inside) for inside in linears),
            largest=max((m.weight.numel() for inside in linears for m in inside), default=0),
            adapter=adapter,
        )

    def resident(self, item: int, tokens: int, logits: int) -> int:
        """Bytes that scoring the whole variant on the device takes.

        item: bytes of a number. tokens: in a batch. logits: bytes of them at a time.
        """
        weights = (self.total - self.packed) * item + self.packed * BYTES_PER_NF4_WEIGHT + self.adapter
        decoded = self.largest * (item + 4) if self.packed else 0
        return int(weights + decoded + self._activations(item, tokens, logits))

    def _activations(self, item: int, tokens: int, logits: int) -> int:
        """Bytes of one batch's activations or logits, and of the reference's head.

        Of activations and logits the larger ones count. Three quarters of a block's inputs and outputs exist at the
        same time.
        """
        head = self.vocabulary * self.width * item
        return max(tokens * (self.inputs_outputs * 3 // 4 + 4 * self.width) * item, logits) + head


def tried_again_from(need: int, free: int) -> int:
    """Free bytes of a device from which what did not fit is tried again: enough for it, and a tenth more than now."""
    return int(max(need / USABLE, 1.1 * free))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count(shape: Iterable[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
