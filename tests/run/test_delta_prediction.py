"""`requant.run.check.delta_prediction`: retention of all or nothing, warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from torch import Tensor

from requant.adapters import peft_directory
from requant.errors import InputError
from requant.numerics import nf4
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.run import prepare, quantize_inputs
from requant.run.check import delta_prediction
from requant.run.check.delta_prediction import Prediction, Sample, retention

ROWS, COLUMNS = 96, 256


def weights(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02


def delta(share: float, of: Tensor, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(ROWS, 8, generator=draw) @ torch.randn(8, COLUMNS, generator=draw)
    return made * (share * float(of.norm()) / float(made.norm()))


def value(base: Tensor, change: Tensor, grid: Grid) -> dict[str, float]:
    return retention([Sample("m", base + change, change, grid)])


# --- identities ---


ON_CODES = Grid(4, 32, search="minmax")


def on_codes() -> tuple[Tensor, Tensor]:
    """Weights that round to themselves, and a mask of them.

    The end of each group, 7.5, sets its scale to exactly 1.
    """
    made = torch.randint(-7, 8, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(2)).float()
    made[:, ::32] = 7.5
    inner = made != 7.5
    assert torch.equal(delta_prediction.rounded(made, ON_CODES)[inner], made[inner])
    return made, inner


def test_weights_that_are_on_the_grid_keep_everything() -> None:
    """D + dW on codes already: rounding changes nothing, so all of the delta is in Q."""
    merged, inner = on_codes()
    change = delta(0.05, merged) * inner
    assert value(merged - change, change, ON_CODES)["value"] == pytest.approx(1, abs=1e-6)


def test_a_delta_below_half_a_code_on_a_base_that_is_on_the_grid_is_gone() -> None:
    """Resonance: Q(D + dW) = D, so nothing of dW is left; of one of many codes all is."""
    base, inner = on_codes()
    change = (torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) - 0.5) * 0.9 * inner
    kept = value(base, change, ON_CODES)
    assert kept["value"] == pytest.approx(0, abs=1e-6)
    assert kept["low"] == pytest.approx(kept["high"], abs=1e-6)
    assert value(base, change * 10, ON_CODES)["value"] > 0.8


def test_the_interval_covers_a_base_that_knows_nothing_of_the_grid() -> None:
    """Gaussian weights, never quantized: rounding errors are independent of the delta."""
    kept = [value(weights(s), delta(0.01, weights(s), seed=100 + s), Grid(4, 64)) for s in range(12)]
    assert sum(k["low"] <= 1 <= k["high"] for k in kept) >= 10
    assert all(0 < k["se"] < 0.2 for k in kept)


def test_nf4_and_a_symmetric_grid_of_its_own_block_size_resonate() -> None:
    """The same small delta and grid on plain weights and on dequantized NF4."""
    plain = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    base = nf4.round_trip(plain, "nf4", 64, double_quant=True)
    draw = torch.Generator().manual_seed(1)
    change = torch.randn(512, 8, generator=draw) @ torch.randn(8, 512, generator=draw)
    change *= 0.003 * float(base.norm()) / float(change.norm())
    grid = Grid(4, 64, search="minmax")
    assert value(base, change, grid)["high"] < 0.6
    assert value(plain, change, grid)["high"] > 0.9
    assert value(base, change, replace(grid, group_size=128))["low"] > value(base, change, grid)["high"]


# --- a model ---


def planned(tmp: Path, **options: Any) -> tuple[Any, Any]:
    base = pico.save(pico.model(), tmp / "base", torch.float32)
    pico.train(pico.reload(base), tmp / "adapter", **options)
    plan, model = prepare.plan_merge(base, peft_directory.load(tmp / "adapter"), None, trust_remote_code=False)
    return plan, quantize_inputs.plan_quantize(plan, model, Settings(grid=Grid(4, 32)), torch.bfloat16)


def test_the_sample_is_every_adapted_module_of_three_blocks(tmp_path: Path) -> None:
    plan, layout = planned(tmp_path)
    samples = list(delta_prediction.draw(plan, layout))
    assert [s.module for s in samples] == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    for s in samples:
        base = plan.base.read(f"{s.module}.weight")
        assert torch.allclose(s.merged - s.delta, base, atol=1e-6)


def test_rows_are_spread_over_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_prediction, "ROWS", 16)
    plan, layout = planned(tmp_path)
    first = next(iter(delta_prediction.draw(plan, layout)))
    assert first.merged.shape == (16, 64)
    base = plan.base.read(f"{first.module}.weight")
    assert torch.allclose(first.merged - first.delta, base[::4], atol=1e-6)


@pytest.mark.parametrize(
    ("weights_of_a_module", "rows"),
    [(10**6, {64: 48, 128: 48}), (40 * 64, {64: 40, 128: 20}), (64, {64: 16, 128: 16})],
)
def test_of_wide_modules_fewer_rows_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_of_a_module: int, rows: dict[int, int]
) -> None:
    """As many weights of each at most, but some rows of all."""
    monkeypatch.setattr(delta_prediction, "ROWS", 48)
    monkeypatch.setattr(delta_prediction, "FEWEST", 16)
    monkeypatch.setattr(delta_prediction, "WEIGHTS", weights_of_a_module)
    plan, layout = planned(tmp_path, target_modules=["q_proj", "down_proj"])
    assert {s.merged.shape[1]: len(s.merged) for s in delta_prediction.draw(plan, layout)} == rows


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, layout = planned(tmp_path, target_modules=["q_proj"])
    compute = delta_prediction.compute

    def spoilt(*given: Any) -> tuple[Tensor, bool]:
        weight, changed = compute(*given)
        weight[1, 2] = float("nan")
        return weight, changed

    monkeypatch.setattr(delta_prediction, "compute", spoilt)
    with pytest.raises(InputError, match=r"q_proj\.weight: NaN or infinity in the adapter or base weights"):
        list(delta_prediction.draw(plan, layout))


def test_an_adapter_of_nothing_that_is_quantized_is_not_judged(tmp_path: Path) -> None:
    plan, layout = planned(tmp_path, target_modules=["lm_head"])
    assert delta_prediction.predict(plan, layout) is None


def test_a_prediction(tmp_path: Path) -> None:
    plan, layout = planned(tmp_path)
    predicted = delta_prediction.predict(plan, layout)
    assert predicted is not None
    assert (predicted.modules, predicted.blocks, predicted.grid) == (4, ("0", "1"), "4-bit g32")
    assert predicted.retention["low"] < predicted.retention["value"] < predicted.retention["high"]
    assert 0 < predicted.relative_delta < 1
    assert 0 < predicted.relative_error < 0.2
    assert "(4 modules of layers 0, 1)" in predicted.sentence()


def prediction(high: float, others: dict[str, dict[str, float]]) -> Prediction:
    kept = {"value": high - 0.02, "se": 0.01, "low": high - 0.04, "high": high}
    return Prediction(
        grid="4-bit g64",
        retention=kept,
        relative_delta=0.01,
        relative_error=0.09,
        modules=21,
        blocks=("0", "15", "29"),
        others=others,
        seconds=1.0,
    )


def test_the_warning_names_only_what_is_surely_better() -> None:
    better = {"value": 0.99, "se": 0.01, "low": 0.97, "high": 1.0}
    unsure = {"value": 0.67, "se": 0.1, "low": 0.5, "high": 0.9}
    (said,) = prediction(0.66, {"4-bit g128": better, "4-bit g32": unsure}).warnings()
    assert "on the 4-bit g64 grid only 64% of the adapter's delta is left" in said
    assert "(other quantize.group_size: 4-bit g128 99%)" in said
    assert "GPTQ usually keeps nearly all of it: 97% on the demo, where rounding keeps 24%" in said
    assert "g32" not in said
    assert prediction(0.96, {"4-bit g128": better}).warnings() == []


def test_it_warns_only_where_another_group_size_is_to_be_chosen() -> None:
    better = {"value": 0.99, "se": 0.01, "low": 0.97, "high": 1.0}
    assert prediction(0.3, {"4-bit g128": better}).warnings()
    assert prediction(0.3, {}).warnings() == []
    assert prediction(0.3, {"8-bit g64": better}).warnings() == [], "8 bits always keep more"


def test_only_a_4_bit_base_has_a_grid_to_resonate_with() -> None:
    kept = {"value": 0.5, "se": 0.01, "low": 0.48, "high": 0.52}
    others = {"4-bit g128": kept | {"low": 0.9}}
    found = Prediction(
        grid="4-bit g64", retention=kept, relative_delta=0.003, relative_error=0.1, modules=3, blocks=("0",), others=others,
        seconds=0.1,
    )  # type: ignore[arg-type]  # fmt: skip
    (packed,), (plain,) = found.warnings(four_bit=True), found.warnings(four_bit=False)
    assert packed.startswith("grid resonance: rounded to nearest on the 4-bit g64 grid only 50%")
    assert "the base's own 4-bit grid" in packed
    assert plain.startswith("delta retention: rounded to nearest on the 4-bit g64 grid only 50%")
    assert "resonance" not in plain
    assert "own 4-bit grid" not in plain
