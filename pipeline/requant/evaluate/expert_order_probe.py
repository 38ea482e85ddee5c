"""In which of two orders the experts of an adapter are right, by the loss on its own text.

Both orders give deltas of the same size. The right one moves predictions to where the text is, the other one moves them
as far at random: the loss falls with the one and not, or less, with the other. Base and merged model are run block by
block, one block of one of them in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from requant.adapters.expert_order import WORDS
from requant.adapters.stacked_lora import Order
from requant.evaluate import adapter_probe
from requant.evaluate.adapter_probe import LOW_EFFICIENCY, Probe, ProbeRow
from requant.evaluate.planned_merge import Device
from requant.evaluate.planned_merge import walk_of as merged_walk
from requant.evaluate.streamed import StreamedModel, walk_of
from requant.evaluate.variants import VariantSources
from requant.merge.plan import MergePlan
from requant.modeling.block_walk import Walk
from requant.runtime.device import free_memory

FEWEST_ROWS, SURE = 3, 3.0  # rows of one text; standard errors between the two losses


class OrderFacts(TypedDict):
    """Losses on the rows of one text in nats a token: of the base, and merged in both orders.

    efficiency: gain per nat of KL to the base, in both orders. difference: of the two losses, unsloth's minus PEFT's;
    se: its standard error, from `rows` rows.
    """

    source: str
    rows: int
    without: float
    losses: dict[Order, float]
    efficiency: dict[Order, float]
    difference: float
    se: float


def measure(
    plans: Mapping[Order, MergePlan],
    sources: VariantSources,
    samples: Mapping[str, Sequence[ProbeRow]],
    where: Device,
    doing: Callable[[str], None] = lambda _: None,
) -> list[OrderFacts]:
    """The losses of each text without the adapter and with it in both orders.

    plans: the merge of this adapter alone onto the base of `sources`. samples: name of a text -> its rows.
    """
    rows = {f"{source} {i}": (row,) for source, many in samples.items() for i, row in enumerate(many)}
    counts = {name: row.tokens for name, (row,) in rows.items()}
    one = next(iter(plans.values()))
    doing("loss of the base, for the order of the experts")
    base = _run(walk_of("base", sources, device=where.device, dtype=where.dtype, rows=one.vocab_size), rows, where)
    probes: dict[Order, dict[str, Probe]] = {}
    for order, plan in plans.items():
        doing(f"loss with the experts in {WORDS[order]}")
        merged = _run(merged_walk(plan, where, trust_remote_code=sources.trust_remote_code), rows, where)
        probes[order] = {p.source: p for p in adapter_probe.measure(_Both(merged, base), rows, where.device)}
        del merged
        free_memory(where.device)
    return [
        _facts(source, {o: [p[f"{source} {i}"] for i in range(len(many))] for o, p in probes.items()}, counts)
        for source, many in samples.items()
    ]


def decide(facts: Sequence[OrderFacts]) -> tuple[Order | None, str]:
    """(the right order, why, in words); None where no text tells, or two tell different things."""
    if facts and all(f["difference"] == f["se"] == 0 for f in facts):
        return "peft", "both orders give the same losses: these experts were never trained"
    found = {f["source"]: order for f in facts if (order := _tells(f)) is not None}
    said = "; ".join(
        f"on {f['rows']} rows of {f['source']} the loss is {f['without']:.3f} without the adapter, "
        f"{f['losses']['peft']:.3f} in PEFT's order and {f['losses']['unsloth']:.3f} in unsloth's "
        f"({abs(f['difference']):.3f} apart, standard error {f['se']:.3f})"
        for f in facts
        if not found or f["source"] in found
    )
    orders = {*found.values()}
    return (orders.pop() if len(orders) == 1 else None), said


def _tells(facts: OrderFacts) -> Order | None:
    """The order that one text shows to be right: its loss is surely the lower one, and far below the base's."""
    right: Order = "peft" if facts["difference"] > 0 else "unsloth"
    sure = facts["rows"] >= FEWEST_ROWS and abs(facts["difference"]) > SURE * facts["se"]
    return right if sure and facts["efficiency"][right] >= LOW_EFFICIENCY else None


def _facts(source: str, probes: Mapping[Order, Sequence[Probe]], counts: Mapping[str, int]) -> OrderFacts:
    tokens = [counts[p.source] for p in probes["peft"]]
    total = sum(tokens)

    def mean(values: Sequence[float]) -> float:
        return sum(n * v for n, v in zip(tokens, values, strict=True)) / total

    apart = [u.with_adapter - p.with_adapter for p, u in zip(probes["peft"], probes["unsloth"], strict=True)]
    difference, count = mean(apart), len(tokens)
    squares = sum((n * (d - difference)) ** 2 for n, d in zip(tokens, apart, strict=True))
    moved = {order: mean([p.moved for p in many]) for order, many in probes.items()}
    gains = {order: mean([p.gain for p in many]) for order, many in probes.items()}
    return {
        "source": source,
        "rows": count,
        "without": mean([p.without for p in probes["peft"]]),
        "losses": {order: mean([p.with_adapter for p in many]) for order, many in probes.items()},
        "efficiency": {order: gains[order] / moved[order] if moved[order] > 0 else 0.0 for order in probes},
        "difference": difference,
        "se": math.sqrt(squares * count / max(1, count - 1)) / total,
    }


def _run(walk: Walk, rows: Mapping[str, Sequence[ProbeRow]], where: Device) -> StreamedModel:
    model = StreamedModel(walk)
    model.run([row.ids for many in rows.values() for row in many], where.batch)
    return model


@dataclass
class _Both:
    """Merged model and base as one model whose adapter can be disabled."""

    merged: StreamedModel
    base: StreamedModel
    without: bool = False

    def __call__(self, input_ids: Tensor) -> Any:
        return (self.base if self.without else self.merged)(input_ids=input_ids)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.without = True
        try:
            yield
        finally:
            self.without = False
