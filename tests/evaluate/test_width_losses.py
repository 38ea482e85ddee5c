"""`requant.evaluate.width_losses`: losses are the KL of the model with that unit rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread, recipe

from requant import merge
from requant.evaluate import planned_merge, width_losses
from requant.evaluate.planned_merge import Device
from requant.numerics.grid import nearest_rows
from requant.run import budget_widths, prepare
from requant.run.prepared import Prepared
from requant_eval.scoring.batches import BatchSize

CPU = Device(torch.device("cpu"), torch.float32, BatchSize(windows=4))
WIDTHS = (2, 3, 4, 8)


def prepared_of(project: Path, out: Path) -> Prepared:
    return prepare.prepare(recipe(project, out, {"quantize": {"budget": 3.5, "group_size": 32}, "heal": "off"}))


def measured(prepared: Prepared, windows: Any, width: int) -> list[dict[int, float]]:
    walk = planned_merge.walk_of(prepared.merge.plan, CPU, trust_remote_code=False, pieces={})
    with one_thread():
        return width_losses.measure(walk, budget_widths.units_of(prepared.quantize.plan), windows, WIDTHS, width)


def test_the_loss_at_the_measured_width_is_the_kl_of_the_rounded_model(project: Path, tmp_path: Path) -> None:
    prepared = prepared_of(project, tmp_path)
    windows = width_losses.sample(prepared.texts.calibration, "cpu")[:3]
    found, units = measured(prepared, windows, 3), budget_widths.units_of(prepared.quantize.plan)
    (tmp_path / "merged").mkdir()
    merge.merge(prepared.merge.plan, tmp_path / "merged", dtype="float32")
    for unit, own in zip(units, found, strict=True):
        model = pico.reload(tmp_path / "merged")
        before = log_probabilities(model, windows)
        for name, grid in unit.grids.items():
            module: Any = model.get_submodule(name)
            module.weight.data = nearest_rows(module.weight.data, dataclasses.replace(grid, bits=3))
        after = log_probabilities(model, windows)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert kl > 1e-5
        assert own[3] == pytest.approx(kl, rel=1e-2), unit.pattern
        assert own[2] > own[3] > own[4] > own[8] > 0


@torch.no_grad()
def log_probabilities(model: Any, windows: Any) -> Any:
    return model(input_ids=windows).logits.double().log_softmax(-1)


def test_other_widths_are_near_what_they_would_measure(project: Path, tmp_path: Path) -> None:
    """The ratio of output errors stands for the ratio of KLs: within a factor of two on a random model."""
    prepared = prepared_of(project, tmp_path)
    windows = width_losses.sample(prepared.texts.calibration, "cpu")[:3]
    by_ratio, itself = measured(prepared, windows, 3), measured(prepared, windows, 4)
    for one, other in zip(by_ratio, itself, strict=True):
        assert 0.5 < one[4] / other[4] < 2


def test_a_sample_is_spread_and_cut() -> None:
    windows = torch.arange(40 * 300).reshape(40, 300)
    some = width_losses.sample(windows, "cpu")
    assert some.shape == (4, 128)
    assert some[:, 0].tolist() == [0, 3000, 6000, 9000]
    assert width_losses.sample(windows[:1, :20], "cpu").shape == (1, 20)
