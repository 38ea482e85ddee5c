"""`requant.evaluate.merge_onto_probe`: losses are those of the written merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread, recipe

from requant import merge
from requant.evaluate import merge_onto_probe
from requant.evaluate.merge_onto_probe import part
from requant.evaluate.planned_merge import Device
from requant.run import onto_choice, prepare
from requant_eval.scoring.batches import BatchSize
from requant_eval.scoring.windows import Document, EvalSet, make_set

CPU = Device(torch.device("cpu"), torch.float32, BatchSize(windows=4))


def test_losses_are_those_of_the_written_merges(project: Path, tmp_path: Path) -> None:
    prepared = prepare.prepare(recipe(project, tmp_path, {"merge.onto": "auto"}))
    assert prepared.merge.other is not None
    plans: Any = {"dequantized": prepared.merge.plan, "original": prepared.merge.other}
    with one_thread():
        parts = [part(s, 500) for s in prepared.texts.sets]
        facts = onto_choice.facts_of(parts, merge_onto_probe.measure(plans, parts, CPU))
        written = {onto: _written(plan, tmp_path / onto) for onto, plan in plans.items()}
    assert [f["set"] for f in facts] == ["in-domain", "general"]
    for found, chosen in zip(facts, parts, strict=True):
        assert (found["documents"], found["tokens"]) == (chosen.n_documents, chosen.n_scored)
        for onto, model in written.items():
            assert found["losses"][onto] == pytest.approx(loss(model, chosen), rel=1e-5)  # type: ignore[index]
        apart = found["losses"]["original"] - found["losses"]["dequantized"]
        assert found["difference"] == pytest.approx(apart, abs=1e-9)
        assert abs(apart) > 1e-6, "two bases, two losses"


def _written(plan: Any, out: Path) -> Any:
    out.mkdir()
    merge.merge(plan, out, dtype="float32")
    return pico.reload(out)


@torch.no_grad()
def loss(model: Any, s: EvalSet) -> float:
    """Mean loss over the scored tokens, window by window, by transformers' model alone."""
    total = 0.0
    for window in s.windows:
        predicted = model(input_ids=window.ids[None]).logits[0, :-1].double().log_softmax(-1)
        nll = -predicted.gather(1, window.ids[1:, None])[:, 0]
        total += float(nll[window.scored[1:]].sum())
    return total / s.n_scored


def test_a_part_is_spread_over_the_set() -> None:
    documents = [Document(tuple(range(5, 5 + n))) for n in (90, 10, 10, 10, 60, 30)]
    whole = make_set("s", documents, window=30, bos_id=None, tail=4)
    assert part(whole, 10**6).windows == whole.windows
    some = part(whole, 80)
    assert 1 < len(some.windows) < len(whole.windows)
    assert some.digest != whole.digest
    assert [w.document for w in some.windows] == sorted(w.document for w in some.windows)
    assert {w.document for w in some.windows} == set(range(some.n_documents)), "numbered without gaps"
    assert some.n_scored == sum(int(w.scored.sum()) for w in some.windows)
    assert len(part(whole, 1).windows) == merge_onto_probe.FEWEST
