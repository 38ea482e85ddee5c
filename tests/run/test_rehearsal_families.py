"""`requant check` tries a block of every model family that is proven end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread
from helpers.families import FAMILIES, Family

from requant.checkpoint.writer import Slot
from requant.modeling import skeleton
from requant.modeling.blocks import block_list
from requant.numerics.grid import Grid
from requant.quantize import plan as layout
from requant.run.check.rehearsal import RandomWeights, Rehearsal
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
    rehearsal, rows = Rehearsal(model, CPU), pico.ids(4, 16)
    documents = [Document(tuple(ids.tolist())) for ids in rows]
    with one_thread():
        quantized = rehearsal.quantizing(planned, settings, rows, 2, lambda _: None)
        scored = rehearsal.scoring(make_set("drawn", documents, window=16, bos_id=None), 2, torch.float32, tmp_path)
    assert quantized.one.seconds > 0
    assert scored.forward.seconds > 0
    assert all(p.is_meta for block in block_list(model)[1] for p in block.parameters())
