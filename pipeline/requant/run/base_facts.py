"""What a report says of the base: its name, how training held it, its size as served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from requant.evaluate import variant_weights
from requant.merge.base_checkpoint import DecodedCheckpoint, open_base_checkpoint
from requant.modeling import skeleton
from requant.numerics.nf4 import QuantType
from requant.recipe import fields
from requant.run.format_facts import weight_bytes
from requant.run.prepared import Prepared
from requant.run.stage_results import OntoDecision


class Nf4Facts(TypedDict):
    """`Nf4Settings` as stored."""

    quant_type: QuantType
    double_quant: bool
    blocksize: int
    load_dtype: Literal["float16", "bfloat16", "float32"]
    compute_dtype: Literal["float16", "bfloat16", "float32"] | None
    skip: Sequence[str]
    version: Literal[4, 5]


class BaseFacts(TypedDict):
    """The base model. nf4: how a 16-bit base was quantized for training; none: it was not.

    choice: how `merge.onto: auto` chose what is merged onto.
    """

    name: str
    nf4: Nf4Facts | Literal["pre-quantized", "none"]
    choice: NotRequired[OntoDecision]


def base_facts(p: Prepared) -> BaseFacts:
    """Name, how training held it, and how `merge.onto: auto` chose."""
    r, nf4 = p.recipe, p.sources.simulate
    found: BaseFacts = {
        "name": public_name(r.base.source, r.directory),
        "nf4": cast(Nf4Facts, asdict(nf4)) if nf4 else "none" if r.base.nf4 == "none" else "pre-quantized",
    }
    return found | {"choice": p.choice} if p.choice else found


def public_name(source: fields.Source, directory: Path) -> str:
    """A hub id as it is, of a local path the last part only."""
    return Path(source.resolve(directory)).name if source.is_local(directory) else source.path


def base_bytes(p: Prepared) -> int:
    """Bytes of the base as it is served with the adapter: as training held it.

    Of a checkpoint in few bits its files; of a 16-bit one what quantizing it on the fly leaves, or 16 bit a weight
    where training did not quantize it.
    """
    base, nf4 = p.merge.plan.base, p.sources.simulate
    if isinstance(base.checkpoint, DecodedCheckpoint):
        return weight_bytes(p.sources.base)
    if p.recipe.base.nf4 == "none":
        return sum(math.prod(w.shape) * min(w.dtype.itemsize, 2) for w in base.weights.values())
    if nf4 is None:
        return weight_bytes(p.sources.base)
    if base.simulate is None:  # merged onto the 16-bit original: the plan knows nothing of the 4-bit base
        model = skeleton.open_model(p.sources.base, trust_remote_code=p.recipe.trust_remote_code)
        base = variant_weights.open_base(open_base_checkpoint(p.sources.base), model, nf4)
    total = 0
    for weight in base.weights.values():
        count = math.prod(weight.shape)
        blocks = math.ceil(count / nf4.blocksize)
        absmax = blocks + 4 * math.ceil(blocks / 256) if nf4.double_quant else 4 * blocks
        packed = math.ceil(count / 2) + absmax
        total += packed if weight.kind == "simulated" else count * weight.dtype.itemsize
    return total
