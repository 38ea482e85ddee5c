"""`requant check` tries a block of every model family that is proven end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.e2e import one_thread
from helpers.families import FAMILIES, Family

from requant.checkpoint.writer import Slot
from requant.modeling import skeleton
from requant.modeling.blocks import block_list
from requant.numerics.grid import Grid
from requant.quantize import plan as layout
from requant.run.check import rehearsal
from requant.run.check.rehearsal import Cost, RandomWeights, Rehearsal
from requant_eval.scoring.windows import Document, make_set

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
def test_a_block_of_every_family_is_rehearsed(tmp_path: Path, family: Family) -> None:
    model = skeleton.build(pico.config(family.kind, **family.changes))
    stored = RandomWeights(model, CPU).shapes
    settings = layout.Settings(grid=Grid(4, 32))
    slots = {n: Slot(n, torch.bfloat16, shape) for n, shape in stored.items()}
    planned = layout.plan(slots, model, settings, torch.bfloat16, where=tmp_path)
    tried, rows = Rehearsal(model, CPU), pico.ids(4, 16)
    documents = [Document(tuple(ids.tolist())) for ids in rows]
    with one_thread():
        quantized = tried.quantizing(planned, settings, rows, 2, lambda _: None)
        scored = tried.scoring(make_set("drawn", documents, window=16, bos_id=None), 2, torch.float32, tmp_path)
    assert quantized.one.seconds > 0
    assert scored.forward.seconds > 0
    assert all(p.is_meta for block in block_list(model)[1] for p in block.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_hybrids_blocks_are_rehearsed_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of one kind, one of another: times add up, memory is the largest."""
    kinds = [*["linear_attention"] * 3, "full_attention"]
    model = skeleton.build(tiny.config("qwen3_5_text", num_hidden_layers=4, layer_types=kinds))
    settings = layout.Settings(grid=Grid(4, 32))
    slots = {n: Slot(n, torch.bfloat16, shape) for n, shape in RandomWeights(model, CPU).shapes.items()}
    planned = layout.plan(slots, model, settings, torch.bfloat16, where=tmp_path)
    tried = Rehearsal(model, CPU)
    assert tried.samples == [(2, 3.0), (3, 1.0)]
    costs = iter([Cost(1.0, 5), Cost(3.0, 9), Cost(10.0, 70), Cost(50.0, 100), *[Cost(2.0, 4), Cost(0.5, 1)] * 9])

    def cost(_: torch.device, work: Any) -> Cost:
        work()
        return next(costs)

    monkeypatch.setattr(rehearsal, "cost_of", cost)
    with one_thread():
        quantized = tried.quantizing(planned, settings, pico.ids(4, 16), 2, lambda _: None)
    assert quantized.one == Cost(3 * 1.0 + 10.0, 70)
    assert quantized.more == Cost(3 * (3.0 - 1.0) / 2 + (50.0 - 10.0) / 2, 15)
